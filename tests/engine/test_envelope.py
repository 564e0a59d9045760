import msgspec
import pytest

from hornbeam.core.request import Finish, LogprobOptions, Request, RequestOutput, SamplingParams, TokenLogprobs
from hornbeam.engine import envelope

pytestmark = pytest.mark.pure

REQUEST = Request(
    rid="é",
    prompt_ids=(1, 2),
    sampling=SamplingParams(max_new_tokens=None, seed=-(2**63), stop_token_ids=(7,), logit_bias=((3, -1.5),)),
    logprobs=LogprobOptions(num_top=2, token_ids=(1, 5), start=0),
)
OUTPUT = RequestOutput(
    rid="é",
    token_ids=(3,),
    logprobs=(TokenLogprobs(chosen=-0.5, top=((3, -0.5), (4, float("-inf")))),),
    finish=Finish(type="stop", matched="\n"),
    num_prompt=2,
)


@pytest.mark.parametrize(
    "command",
    [
        envelope.Submit((REQUEST, REQUEST)),
        envelope.Abort("1"),
        envelope.Abort("1", keep_tokens=0),
        envelope.AbortAll(),
        envelope.Flush(1),
        envelope.Info(2),
        envelope.Shutdown(drain=True),
    ],
)
def test_commands_survive_the_wire(command):
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(command), type=envelope.Command) == command


@pytest.mark.parametrize(
    "event",
    [
        envelope.Ready(1, 2, 3, 4, {"model_path": "x", "nested": {"a": [1, None]}}),
        envelope.StepOutputs((OUTPUT, RequestOutput(rid="2", finish=Finish(type="stop", matched=5)))),
        envelope.Reply(1, True, {"n": 1}),
        envelope.Pulse(),
        envelope.Failed("why", is_config=True),
    ],
)
def test_events_survive_the_wire(event):
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(event), type=envelope.Event) == event


def test_one_kind_is_not_taken_for_the_other():
    with pytest.raises(msgspec.ValidationError):
        msgspec.msgpack.decode(msgspec.msgpack.encode(envelope.Pulse()), type=envelope.Command)
