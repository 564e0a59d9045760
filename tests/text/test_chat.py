import pytest

from hornbeam.core.errors import BadRequest, ConfigError
from hornbeam.text.chat import ChatTemplate, check_template

pytestmark = pytest.mark.pure

SIMPLE = (
    "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}</{{ m.role }}>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello there "}]


def render(source, messages=CHAT, **kwargs):
    return ChatTemplate(source, {"bos_token": "<s>"}).render(messages, **kwargs)


def test_render():
    expected = "<s><user>Hi</user>\n<assistant>Hello there </assistant>\n"
    assert render(SIMPLE) == expected + "<assistant>"
    assert render(SIMPLE, add_generation_prompt=False) == expected


def test_continue_final_message():
    assert render(SIMPLE, continue_final_message=True) == "<s><user>Hi</user>\n<assistant>Hello there "
    assert CHAT[-1]["content"] == "Hello there "
    with pytest.raises(BadRequest, match="drops"):
        render("{{ messages[0].content }}", continue_final_message=True)
    with pytest.raises(BadRequest, match="last message with text"):
        render(SIMPLE, [{"role": "assistant", "content": None}], continue_final_message=True)
    with pytest.raises(BadRequest, match="last message with text"):
        render(SIMPLE, [], continue_final_message=True)


def test_text_parts_are_joined_by_nothing():
    parts = [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]
    assert render("{{ messages[0].content }}", [{"role": "user", "content": parts}]) == "one two"


@pytest.mark.parametrize(
    ("part", "named"), [({"type": "image_url", "image_url": {}}, "image_url"), ("x", "str"), ({"type": "text"}, "text")]
)
def test_other_parts_are_refused_by_name(part, named):
    with pytest.raises(BadRequest, match=named) as error:
        render(SIMPLE, [{"role": "user", "content": [part]}])
    assert error.value.field == "messages"


def test_tools_and_further_variables():
    tools = [{"function": {"name": "<größe>"}}]
    assert render("{{ tools | tojson }} {{ thinking }}", tools=tools, thinking=True) == (
        '[{"function": {"name": "<größe>"}}] True'
    )
    assert render("{% if tools is none %}none{% endif %}") == "none"
    assert render("{{ tools[0] | tojson(indent=1) }}", tools=[{"a": 1}]) == '{\n "a": 1\n}'


def test_blocks_loop_controls_and_generation():
    source = "{% for i in range(9) %}\n  {% if i == 2 %}{% break %}{% endif %}\n{{ i }}\n{% endfor %}\n"
    assert render(source) == "0\n1\n"
    assert render("{% for m in messages %}{% generation %}{{ m.role }};{% endgeneration %}{% endfor %}") == (
        "user;assistant;"
    )


def test_date():
    assert render("{{ strftime_now('%Y') }}").isdigit()


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[0].nothing.more }}", "nothing"),
        ("{% if %}", "Expected an expression"),
        ("{{ 'a' + messages }}", "str"),
        ("{% for i in range(10 ** 9) %}{% endfor %}", "range"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
    ],
)
def test_what_a_template_raises_is_the_answer(source, message):
    with pytest.raises(BadRequest, match=message):
        render(source)


def test_no_template():
    with pytest.raises(BadRequest, match="--chat-template"):
        render(None)


LOOP = "{% for i in range(99999) %}"


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        (LOOP * 3 + "{% endfor %}" * 3, "more than 1000000 turns"),
        ("{{ 'a' * 10000000000 }}", "repetition longer than"),
        ("{{ 9 ** 999999999 }}", "a power of more than 4096 bits"),
        ("{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}", "recursion"),
    ],
)
def test_what_would_never_end_or_fill_the_memory_is_stopped(source, reason):
    check_template(source)
    with pytest.raises(BadRequest, match=reason):
        render(source)


def test_loops_know_where_they_are():
    source = "{% for a, b in x %}{{ loop.index }}/{{ loop.length }}{% if not loop.last %},{% endif %}{% endfor %}"
    assert render(source, x=[(1, 2), (3, 4)]) == "1/2,2/2"
    assert render("{% for i in nothing %}x{% else %}none{% endfor %}{{ '=' * 3 ~ 2 * 2.5 ~ 2 ** 3 }}") == "none===5.08"


def test_a_template_that_nests_too_deeply_is_broken():
    with pytest.raises(ConfigError, match="broken"):
        check_template("{{" + "(" * 20000 + "}}")
