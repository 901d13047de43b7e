"""Event handlers: values by name, errors in the status line, emptied components."""

import functools

import pytest

gr = pytest.importorskip("gradio")

from gradio.helpers import special_args  # noqa: E402

from rl.config import ConfigError, RunError  # noqa: E402
from ui.page import UiError  # noqa: E402
from ui.view import View, frame, menu, table  # noqa: E402


def handler_of(function, inputs="", clears=""):
    """Return the wrapped handler, which returns values by name."""
    with gr.Blocks(analytics_enabled=False):
        view = View(status=gr.Textbox(), text=gr.Textbox(), rows=table("Rows", "a"), state=gr.State({}))
        button = gr.Button()
        view.on(button.click, function, inputs, clears)
        (block_function,) = gr.context.Context.root_block.fns.values()
    names = {id(component): name for name, component in view.items()}
    return block_function, lambda values: {names[id(component)]: value for component, value in values.items()}


def test_values_and_errors_by_name():
    def show(error):
        if error:
            raise error
        return {"text": "new"}

    function, by_name = handler_of(show, "text", "text rows state")
    assert by_name(function.fn(None)) == {"status": "", "text": "new"}
    emptied = {"text": "", "rows": [], "state": []}
    for error in (UiError("There is <b>no</b> run."), ConfigError("beta is wrong"), RunError("x is damaged")):
        assert by_name(function.fn(error)) == emptied | {"status": str(error)}
    assert by_name(function.fn(KeyError("k")))["status"].startswith("Unexpected error: KeyError: 'k'.")
    assert function.api_name == "show" and function.show_progress == "hidden"


def test_a_stream_ends_with_its_error():
    def stream(n):
        for i in range(n):
            yield {"text": i}
        raise UiError("over")

    function, by_name = handler_of(stream, "text", "rows")
    assert list(map(by_name, function.fn(2))) == [
        {"status": "", "text": 0},
        {"status": "", "text": 1},
        {"status": "over", "rows": []},
    ]


def test_a_stream_without_values_changes_nothing():
    """Gradio would empty the outputs."""
    function, by_name = handler_of(empty_stream)
    (values,) = map(by_name, function.fn())
    assert values.keys() == {"status"} and "value" not in values["status"]


def empty_stream():
    yield from ()


def test_bound_arguments_and_events():
    def pick(page, event: gr.SelectData, text):
        return {"text": f"{page} {event.index} {text}"}

    function, by_name = handler_of(functools.partial(pick, "page"), "text")
    event = gr.EventData(None, {"index": 3, "value": None})
    inputs, *_ = special_args(function.fn, ["x"], event_data=event)
    assert by_name(function.fn(*inputs)) == {"status": "", "text": "page 3 x"}


def test_an_input_during_an_event_is_not_ignored():
    with gr.Blocks(analytics_enabled=False) as blocks:
        view = View(status=gr.Textbox(), text=gr.Textbox())
        button = gr.Button()
        view.on([view["text"].input, view["text"].change], lambda text: None, "text", api_name="typed")
        view.on(view["text"].input, lambda text: None, "text", api_name="single")
        view.on(button.click, lambda: None, api_name="clicked")
    modes = {function.api_name: function.trigger_mode for function in blocks.fns.values()}
    assert modes == {"typed": "always_last", "single": "always_last", "clicked": "once"}


def test_components():
    assert frame([], "run") is None, "an empty frame makes a plot treat numbers as categories"
    assert list(frame([(1, 2.0, "a")], "run").columns) == ["x", "y", "run"]
    assert menu("Run", ["a"], "a").preprocess("removed") == "removed"
