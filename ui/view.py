"""Building blocks of the pages: event handlers that report their errors, tables and plots."""

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterable, Iterator

import gradio as gr
import pandas as pd

from ui.page import describe_error
from ui.text import CELL_CHARS


class View(dict):
    """The components of a page by name, one of them its `status` line.

    Handlers take the values of components and return, or yield, a dict of the values to change, by name.
    """

    def on(self, triggers, handler: Callable, inputs: str = "", clears: str = "", **options):
        """Call a handler on events. Its error is shown in the status line, which the next success empties.

        inputs, clears: names of components, separated by spaces. `clears` are emptied by an error, so that data of an
        earlier selection is not shown. options: see gr.on.
        """

        def convert(values: dict | None) -> dict:
            return {self[name]: value for name, value in ({"status": ""} | (values or {})).items()}

        def report(error: Exception) -> dict:
            return convert(
                {name: empty_value(self[name]) for name in clears.split()} | {"status": describe_error(error)}
            )

        def call(*args):
            try:
                return convert(handler(*args))
            except Exception as error:
                return report(error)

        def stream(*args):
            is_empty = True
            try:
                for values in handler(*args):
                    is_empty = False
                    yield convert(values)
                if is_empty:  # then Gradio would empty the outputs
                    yield convert({"status": gr.skip()})
            except Exception as error:
                yield report(error)

        function = handler.func if isinstance(handler, functools.partial) else handler
        wrapper = functools.update_wrapper(stream if inspect.isgeneratorfunction(function) else call, function)
        wrapper.__signature__ = inspect.signature(handler)  # tells Gradio whether it takes an event or a request
        options = {"api_name": function.__name__, "show_progress": "hidden"} | options
        if not isinstance(triggers, list):
            triggers = [triggers]
        if {getattr(trigger, "event_name", None) for trigger in triggers} <= {"input", "select", "change"}:
            options = {"trigger_mode": "always_last"} | options  # else an event during another one is ignored
        triggers = functools.partial(gr.on, triggers) if len(triggers) > 1 else triggers[0]
        return triggers(wrapper, [self[name] for name in inputs.split()], list(self.values()), **options)


# --- components


def status_line(name: str = "status") -> gr.Textbox:
    options = {"show_label": False, "container": False, "interactive": False, "max_lines": 4}
    return gr.Textbox(label="Status", elem_id=name, elem_classes="status", placeholder="Status", **options)


def empty_value(component):
    if isinstance(component, (gr.Dataframe, gr.State)):
        return []
    return "" if isinstance(component, gr.Textbox) else None


def menu(label: str, choices: Iterable = (), value=None, **options) -> gr.Dropdown:
    """Build a dropdown whose choices change while the page is open. A value that was removed is accepted."""
    return gr.Dropdown(list(choices), value=value, label=label, allow_custom_value=True, **{"min_width": 140} | options)


def table(label: str, *headers: str, **options) -> gr.Dataframe:
    options = {"max_height": 360, "wrap": True, "max_chars": CELL_CHARS} | options
    return gr.Dataframe(headers=list(headers), type="array", datatype="str", label=label, interactive=False, **options)


def show_progress(task: Iterator[float], label: str) -> Iterator[dict]:
    """Yield the seconds of a task (tools.reward_process.run_task) in the status line, and return its result."""
    with contextlib.closing(task):
        while True:
            try:
                yield {"status": f"{label}, {next(task):.0f} s ..."}
            except StopIteration as result:
                return result.value


def line_plot(label: str, color: str, x: str = "step", y: str = " ", height: int = 260, **options) -> gr.LinePlot:
    """Build a line plot of a `frame` with a line per value of the column `color`."""
    axes = {"x": "x", "y": "y", "color": color, "x_title": x, "y_title": y}
    options |= {"label": label, "show_label": False, "title": label}  # with a label, the legend is cut off
    return gr.LinePlot(height=height, min_width=380, buttons=["fullscreen"], **axes, **options)


def frame(points: Iterable[tuple], color: str) -> pd.DataFrame | None:
    """Return a frame with the columns x, y and `color`, or None if it is empty: plots take its axes for categories."""
    return pd.DataFrame(points, columns=["x", "y", color]) if points else None
