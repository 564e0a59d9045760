"""A template in the style of GPT-OSS's checkpoints: macros that call themselves, tools as TypeScript, channels."""

import re
from datetime import datetime

import pytest

from hornbeam.core.errors import BadRequest
from hornbeam.text.chat import ChatTemplate

pytestmark = pytest.mark.pure

TEMPLATE = """
{#- In a schema of a tool, what may be nothing, lists and objects nest. -#}
{%- macro type_of(schema, nullable=false) -%}
    {%- if schema.type == "array" -%}
        {{- type_of(schema["items"]) if schema["items"] is defined else "any" }}[]
    {%- elif schema.enum is defined -%}
        {{- '"' + schema.enum | join('" | "') + '"' }}
    {%- elif schema.type == "object" -%}
        {{- "{\\n" -}}
        {%- for name, inner in (schema.properties or {}).items() -%}
            {{- name -}}{%- if name not in (schema.required or []) -%}?{%- endif -%}
            {{- ": " + type_of(inner) -}}{{- ", " if not loop.last else "" -}}
        {%- endfor -%}
        {{- "}" -}}
    {%- elif schema.type is sequence and schema.type is not string -%}
        {{- schema.type | join(" | ") -}}
    {%- elif schema.type in ("integer", "number") -%}
        number
    {%- else -%}
        {{- schema.type if schema.type is defined else "any" -}}
    {%- endif -%}
    {%- if nullable %} | null{% endif -%}
{%- endmacro -%}

{%- macro namespace_of(tools) -%}
    {{- "namespace functions {\\n\\n" -}}
    {%- for tool in tools | map(attribute="function") -%}
        {{- "// " + tool.description + "\\n" -}}
        {%- set properties = tool.parameters.properties if tool.parameters else {} -%}
        {%- if properties -%}
            {{- "type " + tool.name + " = (_: {\\n" -}}
            {%- for name, schema in properties.items() -%}
                {%- if schema is mapping and schema.description -%}
                    {{- "// " + schema.description + "\\n" -}}
                {%- endif -%}
                {{- name -}}{{- "?" if name not in tool.parameters.required else "" -}}
                {{- ": " -}}{{- type_of(schema, schema.nullable | default(false)) -}}
                {%- if schema.default is defined -%}
                    {{- ", // default: " + (schema.default if schema.default is string else schema.default | tojson) -}}
                {%- else -%}
                    {{- "," -}}
                {%- endif -%}
                {{- "\\n" -}}
            {%- endfor -%}
            {{- "}) => any;\\n\\n" -}}
        {%- else -%}
            {{- "type " + tool.name + " = () => any;\\n\\n" -}}
        {%- endif -%}
    {%- endfor -%}
    {{- "} // namespace functions" -}}
{%- endmacro -%}

{{- "<|start|>system<|message|>" -}}
{{- (model_identity if model_identity is defined else "You are a model.") + "\\n" -}}
{{- "Current date: " + strftime_now("%Y-%m-%d") + "\\n\\nReasoning: " + (reasoning_effort or "medium") -}}
{{- "\\n\\n# Valid channels: analysis, commentary, final." + "<|end|>" -}}

{%- set developer = namespace(message="", rest=messages) -%}
{%- if messages[0].role in ("developer", "system") -%}
    {%- set developer.message = messages[0].content -%}
    {%- set developer.rest = messages[1:] -%}
{%- endif -%}
{%- if developer.message or tools -%}
    {{- "<|start|>developer<|message|>" -}}
    {%- if developer.message -%}{{- "# Instructions\\n\\n" + developer.message -}}{%- endif -%}
    {%- if tools -%}{{- "\\n\\n# Tools\\n\\n## functions\\n\\n" + namespace_of(tools) -}}{%- endif -%}
    {{- "<|end|>" -}}
{%- endif -%}

{%- set last_call = namespace(name=none) -%}
{%- for message in developer.rest -%}
    {%- if message.role == "assistant" -%}
        {%- if "content" in message and "<|channel|>" in (message.content or "") -%}
            {{- raise_exception("channels belong in fields of their own") -}}
        {%- endif -%}
        {%- if message.tool_calls -%}
            {%- if message.tool_calls | length > 1 -%}{{- raise_exception("one call at a time") -}}{%- endif -%}
            {%- set call = message.tool_calls[0].function -%}
            {%- if message.thinking -%}
                {{- "<|start|>assistant<|channel|>analysis<|message|>" + message.thinking + "<|end|>" -}}
            {%- endif -%}
            {{- "<|start|>assistant to=functions." + call.name + "<|channel|>commentary json<|message|>" -}}
            {{- (call.arguments if call.arguments is string else call.arguments | tojson) + "<|call|>" -}}
            {%- set last_call.name = call.name -%}
        {%- else -%}
            {%- generation -%}
            {{- "<|start|>assistant<|channel|>final<|message|>" + message.content -}}
            {%- endgeneration -%}
            {{- "<|return|>" if loop.last and not add_generation_prompt else "<|end|>" -}}
            {%- set last_call.name = none -%}
        {%- endif -%}
    {%- elif message.role == "tool" -%}
        {%- if last_call.name is none -%}{{- raise_exception("a result without a call") -}}{%- endif -%}
        {{- "<|start|>functions." + last_call.name + " to=assistant<|channel|>commentary<|message|>" -}}
        {{- message.content | tojson + "<|end|>" -}}
    {%- else -%}
        {{- "<|start|>" + message.role + "<|message|>" + message.content + "<|end|>" -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}<|start|>assistant{%- endif -%}
"""
SYSTEM = (
    "<|start|>system<|message|>You are a model.\nCurrent date: TODAY\n\nReasoning: medium\n\n"
    "# Valid channels: analysis, commentary, final.<|end|>"
)
WEATHER = {
    "name": "weather",
    "description": "What the sky does.",
    "parameters": {
        "type": "object",
        "required": ["place"],
        "properties": {
            "place": {"type": "string", "description": "A town."},
            "unit": {"type": "string", "enum": ["C", "F"], "default": "C"},
            "days": {"type": "array", "items": {"type": "integer"}, "nullable": True},
            "at": {
                "type": "object",
                "properties": {"x": {"type": "number"}, "y": {"type": "number"}},
                "required": ["x"],
            },
        },
    },
}
CALL = {"function": {"name": "weather", "arguments": '{"place": "Rome"}'}}


def render(messages: list[dict[str, object]], **kwargs: object) -> str:
    prompt = ChatTemplate(TEMPLATE, {}).render(messages, **kwargs)
    return re.sub(re.escape(datetime.now().strftime("%Y-%m-%d")), "TODAY", prompt)


def test_a_chat() -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    developer = "<|start|>developer<|message|># Instructions\n\nBe brief.<|end|>"
    assert render(messages) == SYSTEM + developer + "<|start|>user<|message|>Hi<|end|><|start|>assistant"


def test_variables_and_the_end_of_a_finished_chat() -> None:
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    prompt = render(messages, add_generation_prompt=False, reasoning_effort="high", model_identity="You are Ada.")
    assert "You are Ada.\n" in prompt
    assert "Reasoning: high" in prompt
    assert prompt.endswith("<|start|>assistant<|channel|>final<|message|>Hello<|return|>")


def test_tools_calls_and_results() -> None:
    messages = [
        {"role": "user", "content": "Sun?"},
        {"role": "assistant", "content": None, "thinking": "I look.", "tool_calls": [CALL]},
        {"role": "tool", "content": "yes"},
    ]
    plain = {"type": "function", "function": {"name": "now", "description": "The time.", "parameters": None}}
    prompt = render(messages, tools=[{"type": "function", "function": WEATHER}, plain])
    assert prompt == (
        SYSTEM + "<|start|>developer<|message|>\n\n# Tools\n\n## functions\n\nnamespace functions {\n\n"
        "// What the sky does.\ntype weather = (_: {\n// A town.\nplace: string,\n"
        'unit?: "C" | "F", // default: C\ndays?: number[] | null,\nat?: {\nx: number, y?: number},\n}) => any;\n\n'
        "// The time.\ntype now = () => any;\n\n} // namespace functions<|end|>"
        "<|start|>user<|message|>Sun?<|end|>"
        "<|start|>assistant<|channel|>analysis<|message|>I look.<|end|>"
        '<|start|>assistant to=functions.weather<|channel|>commentary json<|message|>{"place": "Rome"}<|call|>'
        '<|start|>functions.weather to=assistant<|channel|>commentary<|message|>"yes"<|end|><|start|>assistant'
    )


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        ({"role": "tool", "content": "yes"}, "a result without a call"),
        ({"role": "assistant", "content": "", "tool_calls": [CALL, CALL]}, "one call at a time"),
        ({"role": "assistant", "content": "<|channel|>final"}, "fields of their own"),
    ],
)
def test_what_the_template_refuses_is_told(message: dict[str, object], reason: str) -> None:
    with pytest.raises(BadRequest, match=reason):
        render([{"role": "user", "content": "Hi"}, message])
