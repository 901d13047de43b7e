"""The thread that owns the models: the base is the base, whatever else goes on; stopping; what goes wrong, in words."""

import dataclasses
import gc
import shutil
import threading
import time
import weakref

import pytest
import torch
import yaml
from conftest import fill_lora

from rl.config import Config
from rl.model.policy import load_policy, save_adapter
from rl.model.sampling import Sampling
from rl.rollout import rollout
from ui import models
from ui import worker as module
from ui.runs import Runs
from ui.turns import Ask
from ui.worker import Worker

QUESTION = "2 + 5 + 6 - 6 + 6 = ?"
SYSTEM = "Ben has 4 dollars. Ben finds 9."
GREEDY = Sampling(0)
PERTURBED = 0.12  # the noise of a LoRA: it answers something else, and ends
BABBLES_ON = 0.3  # it writes on and on


def make_run(folder, name, policy, model="data/tiny", checkpoint="step_000001", **settings):
    """A run folder as far as the worker reads one."""
    (folder / name / "checkpoints").mkdir(parents=True, exist_ok=True)
    settings = {"model": model, "device": "cpu"} | settings
    (folder / name / "config.yaml").write_text(yaml.safe_dump(settings))
    save_adapter(policy, folder / name / "checkpoints" / checkpoint)


def plain(policy, question=QUESTION, n=1, max_tokens=40, sampling=GREEDY, seed=0):
    """What the policy answers in a roll-out of its own."""
    generator = torch.Generator().manual_seed(seed)
    episodes = rollout(policy, [policy.encode_prompt(question)], n, max_tokens, sampling, generator, n)
    return [policy.decode(episode.completion_ids) for episode in episodes]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A runs folder with two runs over data/tiny, one over another base, and what each of them says, by plain roll-outs."""
    folder, texts = tmp_path_factory.mktemp("ui") / "runs", {}
    policy = load_policy(Config(device="cpu"))
    fill_lora(policy, PERTURBED)
    make_run(folder, "one", policy)
    texts["one"] = plain(policy)
    texts["sampled"] = plain(policy, n=5, sampling=Sampling(1.0, top_p=0.9), seed=7)
    with policy.reference():
        texts["base"] = plain(policy)
        policy.system_prompt = SYSTEM
        texts["base with a system prompt"] = plain(policy)
        policy.system_prompt = None
    fill_lora(policy, BABBLES_ON)
    make_run(folder, "babbles", policy, system_prompt=SYSTEM)
    other = folder.parent / "other"
    shutil.copytree("data/tiny", other)
    generator = torch.Generator().manual_seed(3)
    for parameter in policy.model.get_base_model().parameters():
        parameter.data *= 1 + 0.4 * torch.randn(parameter.shape, generator=generator)
    with policy.reference():
        texts["other base"] = plain(policy)
    model = policy.model.unload()
    model.save_pretrained(other)
    policy = load_policy(Config(device="cpu", model=str(other)))
    fill_lora(policy, PERTURBED)
    texts["other"] = plain(policy)
    make_run(folder, "other", policy, str(other))
    assert len({text for said in texts.values() for text in said}) >= 7  # else nothing is shown below
    return Runs(folder), texts


@pytest.fixture(scope="module")
def worker(made):
    return Worker(made[0])


ONE, BABBLES, OTHER = ((name, "step_000001") for name in ("one", "babbles", "other"))


def ask(*sides, question=QUESTION, run="one", **how):
    messages = [[{"role": "user", "content": question}] for _ in sides]
    return Ask(sides, tuple(messages), run, **{"max_tokens": 40} | how)


def last(worker, *sides, **how):
    """How the sides stand at the end."""
    return list(worker.answer(ask(*sides, **how)))[-1]


def said(answers):
    assert [answer.state for answer in answers] == ["done"] * len(answers), answers
    return [[sample.text for sample in answer.samples] for answer in answers]


def started(worker, *sides, **how):
    """A question that is being answered."""
    question = ask(*sides, **how)
    answering = worker.answer(question)
    for answers in answering:
        if all(answer.state == "answering" and answer.samples[0].token_ids for answer in answers):
            return question, answering
    raise AssertionError(answers)


def test_the_base_is_the_base(made, worker):
    _, texts = made
    assert said(last(worker, None, ONE)) == [texts["base"], texts["one"]]
    assert said(last(worker, ONE, None)) == [texts["one"], texts["base"]]
    assert said(last(worker, None, None)) == [texts["base"], texts["base"]]
    assert texts["base"] != texts["one"]


def test_the_base_is_the_base_where_nothing_can_be_folded(made, worker, monkeypatch):
    """Then every step reads the LoRA that is on."""
    monkeypatch.setattr("rl.model.decoder.Decoder.can_fold", lambda self: False)
    assert said(last(worker, None, ONE)) == [made[1]["base"], made[1]["one"]]
    monkeypatch.setattr("rl.model.policy.unsupported_reason", lambda model: "it is a test")
    other = Worker(made[0])
    assert said(last(other, ONE, None)) == [made[1]["one"], made[1]["base"]]
    assert other.models.policy.decoder is None


@pytest.mark.parametrize("folds", [True, False])
def test_two_visitors_at_once(made, worker, folds, monkeypatch):
    """Also while a third one's sides write on and on."""
    if not folds:
        monkeypatch.setattr("rl.model.decoder.Decoder.can_fold", lambda self: False)
    _, texts = made
    _, third = started(worker, BABBLES, BABBLES, max_tokens=400)
    found = {}

    def visit(name, sides, expected):
        found[name] = [said(last(worker, *sides)) == expected for _ in range(3)]

    visits = {
        "a": ((None, ONE), [texts["base"], texts["one"]]),
        "b": ((ONE, None), [texts["one"], texts["base"]]),
    }
    threads = [threading.Thread(target=visit, args=(name, *visit_)) for name, visit_ in visits.items()]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        next(third, None)
    third.close()
    assert found == {"a": [True] * 3, "b": [True] * 3}


def test_it_streams_and_the_first_token_comes_soon(made):
    worker = Worker(made[0])
    worker.load_ahead("one")
    while not (worker.models and worker.models.policy):
        time.sleep(0.01)
    begun, first, lengths = time.monotonic(), None, []
    for answers in worker.answer(ask(None, BABBLES, max_tokens=400)):
        lengths.append(sum(len(answer.samples[0].token_ids) if answer.samples else 0 for answer in answers))
        if lengths[-1] and first is None:
            first = time.monotonic() - begun
    seconds = time.monotonic() - begun
    assert first < 1
    assert lengths == sorted(lengths) and len(set(lengths)) >= 3
    assert len(lengths) <= 2 * 10 * seconds + 6  # about ten updates a second of each side


def test_stopped_and_gone_on(made, worker):
    question, answering = started(worker, None, BABBLES, max_tokens=400, temperature=1.0)
    question.stop.set()
    answers = list(answering)[-1]
    assert {answer.state for answer in answers} <= {"stopped", "done"} and answers[1].state == "stopped"
    assert 0 < len(answers[1].samples[0].token_ids) < 400 and not answers[1].samples[0].ended
    assert said(last(worker, None, ONE)) == [made[1]["base"], made[1]["one"]]
    assert worker._jobs == []


def test_three_cancels_in_a_row(made, worker):
    for _ in range(3):
        _, answering = started(worker, None, BABBLES, max_tokens=400)
        answering.close()
    for _ in range(3):
        next(worker.answer(ask(None, BABBLES, max_tokens=400)))  # dropped at once
    assert said(last(worker, None, ONE)) == [made[1]["base"], made[1]["one"]]


def test_a_closed_iterator_leaves_nothing(made, worker):
    """As Gradio closes it when a page is gone."""
    _, answering = started(worker, None, BABBLES, max_tokens=400)
    (turns,) = worker._jobs
    engines = [weakref.ref(turn.engine) for turn in turns]
    del turns
    answering.close()
    assert worker._jobs == []
    assert said(last(worker, None, ONE)) == [made[1]["base"], made[1]["one"]]
    gc.collect()
    assert not any(engine() for engine in engines), "they hold the cache"


def test_questions_wait_for_their_turn(made, worker, monkeypatch):
    monkeypatch.setattr(module, "AT_ONCE", 1)
    question, first = started(worker, None, BABBLES, max_tokens=400, temperature=1.0)
    second = worker.answer(ask(None, ONE))
    notes = {answer.note for answer in next(second) if answer.state == "waiting"}
    next(first)
    assert "1 other questions are being answered: this one waits for its turn" in notes
    question.stop.set()
    assert said(list(second)[-1]) == [made[1]["base"], made[1]["one"]]


def test_another_base(made, worker):
    """On one side, for a visitor who comes while the first base is being asked, and back."""
    runs, texts = made
    both = {"run": "other"}
    assert said(last(worker, None, OTHER, **both)) == [texts["other base"], texts["other"]]
    assert said(last(worker, None, OTHER)) == [texts["base"], texts["other"]]  # the base of run one
    question, first = started(worker, None, BABBLES, max_tokens=400, temperature=1.0)
    second = worker.answer(ask(None, OTHER, **both))
    notes = [answer.note for answer in next(second)]
    next(first)
    assert any(note.startswith("waits for ") and "data/tiny" in note for note in notes)
    question.stop.set()
    assert said(list(second)[-1]) == [texts["other base"], texts["other"]]
    assert said(last(worker, None, ONE)) == [texts["base"], texts["one"]]


def test_samples_are_those_of_a_roll_out(made, worker):
    how = {"samples": 5, "temperature": 1.0, "top_p": 0.9, "seed": 7}
    answers = last(worker, ONE, None, **how)
    assert said(answers)[0] == made[1]["sampled"]
    assert said(last(worker, ONE, None, **how)) == said(answers) != said(last(worker, ONE, None, **how | {"seed": 8}))
    (cut,) = last(worker, BABBLES, max_tokens=3)[0].samples
    assert cut.truncated and cut.ended and len(cut.token_ids) == 3


def test_a_runs_system_prompt_is_put_to_its_base_too(made, worker):
    assert said(last(worker, None, run="babbles"))[0] == made[1]["base with a system prompt"]


def test_what_the_template_opened_is_in_the_text(made, worker, monkeypatch):
    monkeypatch.setattr("rl.model.policy.Policy.completion_prefix", lambda self, prompt: "<think>\n")
    assert said(last(worker, None))[0] == ["<think>\n" + made[1]["base"][0]]


def test_adapters_that_are_broken_or_do_not_fit(made, worker, tmp_path):
    """That side says so, and the other one answers."""
    runs, texts = made
    folders = {name: runs.folder / "one/checkpoints" / f"step_00000{i}" for i, name in enumerate("abcd", 2)}
    for folder in folders.values():
        shutil.copytree(runs.folder / "one/checkpoints/step_000001", folder)
    weights = {name: folder / "adapter_model.safetensors" for name, folder in folders.items()}
    weights["a"].write_bytes(weights["a"].read_bytes()[:5000])
    settings = folders["b"] / "adapter_config.json"
    settings.write_text(settings.read_text().replace('"r": 16', '"r": 8'))
    weights["c"].unlink()
    (folders["d"] / "adapter_config.json").write_text("{")
    for name, folder in folders.items():
        base, broken = last(worker, None, ("one", folder.name))
        assert said([base]) == [texts["base"]]
        assert broken.state == "failed" and broken.note.startswith("adapter: ") and folder.name in broken.note, name
        assert "\n" not in broken.note
    assert set(worker.models.policy.model.peft_config) == {"default", *worker.models.adapters.values()}
    assert said(last(worker, None, ONE)) == [texts["base"], texts["one"]]
    for folder in folders.values():
        shutil.rmtree(folder)


def test_a_checkpoint_of_another_base_does_not_fit(made, worker):
    runs, texts = made
    policy = load_policy(Config(device="cpu"))
    del policy.model.get_base_model().model.layers[3]
    make_run(runs.folder, "shorter", policy)
    answers = last(worker, None, ("shorter", "step_000001"))
    assert answers[1].state == "failed" and "cannot be put on data/tiny" in answers[1].note
    assert said(answers[:1]) == [texts["base"]]


def test_many_checkpoints(made, worker, monkeypatch):
    """Of those that nobody asks, some are dropped; one that is written anew is read anew."""
    monkeypatch.setattr(models, "ADAPTERS", 2)
    runs, texts = made
    first = runs.folder / "one/checkpoints/step_000001"
    for i in range(2, 6):
        shutil.copytree(first, first.with_name(f"step_00000{i}"))
    for i in (1, 2, 3, 4, 5, 1):
        assert said(last(worker, None, ("one", f"step_00000{i}"))) == [texts["base"], texts["one"]]
        assert len(worker.models.policy.model.peft_config) <= 1 + 2
    babbling = (runs.folder / "babbles/checkpoints/step_000001/adapter_model.safetensors").read_bytes()
    (first.with_name("step_000005") / "adapter_model.safetensors").write_bytes(babbling)
    assert said(last(worker, ("one", "step_000005")))[0] != texts["one"]
    for i in range(2, 6):
        shutil.rmtree(first.with_name(f"step_00000{i}"))


def test_what_goes_wrong_is_said_and_ends_one_question_alone(made, worker, monkeypatch):
    from rl.model import engine

    runs, texts = made
    _, other = started(worker, None, BABBLES, max_tokens=400, temperature=1.0)
    original = engine.Engine.__init__

    def short_of_memory(self, policy, prompts, n, *rest):
        if n == 16:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        original(self, policy, prompts, n, *rest)

    monkeypatch.setattr(engine.Engine, "__init__", short_of_memory)
    (answer,) = last(worker, None, samples=16)
    assert answer.state == "failed" and answer.note.startswith("Out of memory. Lower the samples a side (now 16)")
    assert next(other)[1].state == "answering"
    other.close()
    notes = {
        "no run": last(worker, ("nowhere", "step_000001"))[0].note,
        "no checkpoint": last(worker, ("one", "../../../etc"))[0].note,
        "too long": last(worker, None, question="1 + " * 400)[0].note,
    }
    assert notes["no run"].startswith("There is no run 'nowhere'")
    assert notes["no checkpoint"] == "one has no checkpoint '../../../etc'. It has step_000001."
    assert "the model reads 512 at most" in notes["too long"]
    (runs.folder / "gone").mkdir()
    (runs.folder / "gone/config.yaml").write_text("model: nobody/nothing\ndevice: cpu\n")
    assert last(worker, None, run="gone")[0].note.startswith("model: nobody/nothing cannot be loaded")
    (runs.folder / "gone/config.yaml").write_text("modle: data/tiny\n")
    assert "modle" in last(worker, None, run="gone")[0].note
    shutil.rmtree(runs.folder / "gone")
    assert said(last(worker, None, ONE)) == [texts["base"], texts["one"]]


def test_a_run_that_trains_on_the_card_keeps_it(made, worker, monkeypatch):
    config = Config(device="auto", dtype="bfloat16")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert (
        worker.models.device(config) == "cuda"
        and worker.models.device(dataclasses.replace(config, device="cpu")) == "cpu"
    )
    monkeypatch.setattr(models.Models, "run_on_card", lambda self: "one")
    assert worker.models.device(config) == "cpu"
    with pytest.raises(models.UiError, match="one is training on the card, and Qwen/Qwen3-8B is too large"):
        worker.models.device(Config(model="Qwen/Qwen3-8B"))
