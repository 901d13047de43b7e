"""The thread that owns the models: both sides step in turn without interference, one request at a time, errors."""

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
from rl.model.lora import save_adapter
from rl.model.policy import load_policy
from rl.model.sampling import Sampling
from rl.rollout import rollout
from rl.run.reader import Runs
from ui import models
from ui.turns import ChatRequest
from ui.worker import Worker

QUESTION = "2 + 5 + 6 - 6 + 6 = ?"
SYSTEM = "Ben has 4 dollars. Ben finds 9."
GREEDY = Sampling(0)
PERTURBED = 0.12  # LoRA noise that changes the answer, which still ends
ENDLESS_NOISE = 0.3  # LoRA noise that makes the model write until max_tokens


def make_run(folder, name, policy, model="data/tiny", checkpoint="step_000001", **settings):
    """Make a run folder with the files that the worker reads."""
    (folder / name / "checkpoints").mkdir(parents=True, exist_ok=True)
    settings = {"model": model, "device": "cpu"} | settings
    (folder / name / "config.yaml").write_text(yaml.safe_dump(settings))
    save_adapter(policy, folder / name / "checkpoints" / checkpoint)


def rollout_texts(policy, question=QUESTION, n=1, max_tokens=40, sampling=GREEDY, seed=0):
    """Return the completions of the policy in a separate roll-out."""
    generator = torch.Generator().manual_seed(seed)
    episodes = rollout(policy, [policy.encode_prompt(question)], n, max_tokens, sampling, generator, n)
    return [policy.decode(episode.completion_ids) for episode in episodes]


@pytest.fixture(scope="module")
def runs_and_texts(tmp_path_factory):
    """A runs folder with two runs on data/tiny and one on another base, and the completions of each in a roll-out."""
    folder = tmp_path_factory.mktemp("ui") / "runs"
    texts = {}
    policy = load_policy(Config(device="cpu"))
    fill_lora(policy, PERTURBED)
    make_run(folder, "one", policy)
    texts["one"] = rollout_texts(policy)
    texts["sampled"] = rollout_texts(policy, n=5, sampling=Sampling(1.0, top_p=0.9), seed=7)
    with policy.reference():
        texts["base"] = rollout_texts(policy)
        policy.system_prompt = SYSTEM
        texts["base with a system prompt"] = rollout_texts(policy)
        policy.system_prompt = None
    fill_lora(policy, ENDLESS_NOISE)
    make_run(folder, "endless", policy, system_prompt=SYSTEM)
    other = folder.parent / "other"
    shutil.copytree("data/tiny", other)
    generator = torch.Generator().manual_seed(3)
    for parameter in policy.model.get_base_model().parameters():
        parameter.data *= 1 + 0.4 * torch.randn(parameter.shape, generator=generator)
    with policy.reference():
        texts["other base"] = rollout_texts(policy)
    model = policy.model.unload()
    model.save_pretrained(other)
    policy = load_policy(Config(device="cpu", model=str(other)))
    fill_lora(policy, PERTURBED)
    texts["other"] = rollout_texts(policy)
    make_run(folder, "other", policy, str(other))
    assert len({text for group in texts.values() for text in group}) >= 7  # otherwise the tests below prove nothing
    return Runs(folder), texts


@pytest.fixture(scope="module")
def worker(runs_and_texts):
    return Worker(runs_and_texts[0])


ONE, ENDLESS, OTHER = ((name, "step_000001") for name in ("one", "endless", "other"))


def make_request(*sides, question=QUESTION, run="one", **options):
    conversations = [[[{"role": "user", "content": question}]] for _ in sides]
    return ChatRequest(sides, tuple(conversations), run, **{"max_tokens": 40} | options)


def ask(worker, *sides, **options):
    """Return the final answers of the sides."""
    return list(worker.answer(make_request(*sides, **options)))[-1]


def sample_texts(answers):
    """Return the sample texts of each side. All sides must be done."""
    assert [answer.state for answer in answers] == ["done"] * len(answers), answers
    return [[sample.text for sample in answer.samples] for answer in answers]


def start(worker, *sides, **options):
    """Return a request and its iterator of answers, once every side has written a token."""
    request = make_request(*sides, **options)
    updates = worker.answer(request)
    for answers in updates:
        if all(answer.state == "answering" and answer.samples[0].token_ids for answer in answers):
            return request, updates
    raise AssertionError(answers)


def test_base_and_checkpoint_do_not_interfere(runs_and_texts, worker):
    _, texts = runs_and_texts
    assert sample_texts(ask(worker, None, ONE)) == [texts["base"], texts["one"]]
    assert sample_texts(ask(worker, ONE, None)) == [texts["one"], texts["base"]]
    assert sample_texts(ask(worker, None, None)) == [texts["base"], texts["base"]]
    assert texts["base"] != texts["one"]


def test_base_and_checkpoint_do_not_interfere_without_folding(runs_and_texts, worker, monkeypatch):
    """Without folding, every decode step reads the active adapter."""
    runs, texts = runs_and_texts
    monkeypatch.setattr("rl.model.decoder.Decoder.can_fold", lambda self: False)
    assert sample_texts(ask(worker, None, ONE)) == [texts["base"], texts["one"]]
    monkeypatch.setattr("rl.model.policy.unsupported_reason", lambda model: "test")
    other = Worker(runs)
    assert sample_texts(ask(other, ONE, None)) == [texts["one"], texts["base"]]
    assert other.models.policy.decoder is None


def test_visitors_are_answered_one_after_another(runs_and_texts, worker):
    """Gradio's queue sends one request at a time. If two arrive anyway, the second one waits for the first one."""
    _, texts = runs_and_texts
    request, first = start(worker, None, ENDLESS, max_tokens=400, temperature=1.0)
    results = []
    second = threading.Thread(target=lambda: results.append(ask(worker, None, ONE)))
    second.start()
    next(first)
    assert results == []
    request.stop.set()
    second.join(30)
    assert sample_texts(results[0]) == [texts["base"], texts["one"]]


def test_stop_ends_a_request_that_waits_for_another_visitor(runs_and_texts, worker):
    busy, updates = start(worker, None, ENDLESS, max_tokens=400, temperature=1.0)
    request = make_request(None, ONE)
    request.stop.set()
    start_time = time.monotonic()
    *_, answers = worker.answer(request)
    assert [answer.state for answer in answers] == ["stopped"] * 2 and time.monotonic() - start_time < 2
    busy.stop.set()
    list(updates)


def test_answers_stream_with_low_latency(runs_and_texts):
    worker = Worker(runs_and_texts[0])
    worker.preload("one")
    while not (worker.models and worker.models.policy):
        time.sleep(0.01)
    start_time = time.monotonic()
    latency = None
    lengths = []
    for answers in worker.answer(make_request(None, ENDLESS, max_tokens=400)):
        lengths.append(sum(len(answer.samples[0].token_ids) if answer.samples else 0 for answer in answers))
        if lengths[-1] and latency is None:
            latency = time.monotonic() - start_time
    seconds = time.monotonic() - start_time
    assert latency < 1
    assert lengths == sorted(lengths) and len(set(lengths)) >= 3
    assert len(lengths) <= 2 * 10 * seconds + 6  # about ten updates per second and side


def test_next_question_is_answered_after_stop(runs_and_texts, worker):
    _, texts = runs_and_texts
    request, updates = start(worker, None, ENDLESS, max_tokens=400, temperature=1.0)
    request.stop.set()
    answers = list(updates)[-1]
    assert {answer.state for answer in answers} <= {"stopped", "done"} and answers[1].state == "stopped"
    assert 0 < len(answers[1].samples[0].token_ids) < 400 and not answers[1].samples[0].finished
    assert sample_texts(ask(worker, None, ONE)) == [texts["base"], texts["one"]]


def test_three_cancels_in_a_row(runs_and_texts, worker):
    _, texts = runs_and_texts
    for _ in range(3):
        _, updates = start(worker, None, ENDLESS, max_tokens=400)
        updates.close()
    for _ in range(3):
        next(worker.answer(make_request(None, ENDLESS, max_tokens=400)))  # discarded immediately
    assert sample_texts(ask(worker, None, ONE)) == [texts["base"], texts["one"]]


def test_closed_iterator_releases_memory(runs_and_texts, worker, monkeypatch):
    """Gradio closes the iterator when a visitor leaves the page."""
    _, texts = runs_and_texts
    engines = []
    start_answer = models.Models.start_answer

    def remember(self, turn, in_use):
        start_answer(self, turn, in_use)
        engines.append(weakref.ref(turn.engine))

    monkeypatch.setattr(models.Models, "start_answer", remember)
    _, updates = start(worker, None, ENDLESS, max_tokens=400)
    updates.close()
    assert sample_texts(ask(worker, None, ONE)) == [texts["base"], texts["one"]]
    gc.collect()
    assert len(engines) == 4 and not any(engine() for engine in engines), "the engines hold the cache"


def test_another_base_model(runs_and_texts, worker):
    """The base model is switched between questions, and between the sides of one."""
    _, texts = runs_and_texts
    assert sample_texts(ask(worker, None, OTHER, run="other")) == [texts["other base"], texts["other"]]
    updates = list(worker.answer(make_request(None, OTHER)))  # the base model of run "one"
    assert sample_texts(updates[-1]) == [texts["base"], texts["other"]]
    notes = {answer.note for answers in updates for answer in answers if answer.state == "loading"}
    assert len(notes) == 2 and "Loading data/tiny ..." in notes
    assert sample_texts(ask(worker, None, ONE)) == [texts["base"], texts["one"]]


def test_many_conversations_at_once(runs_and_texts, worker):
    """The answers are those of single questions. Texts are shown when all are finished."""
    questions = ["1 + 2 = ?", QUESTION, "What is 3 + 4?"] * 8
    conversations = [[{"role": "user", "content": question}] for question in questions]
    request = ChatRequest((None, ONE), (conversations, conversations), "one", max_tokens=40)
    updates = list(worker.answer(request))
    assert all(answer.samples == () for answers in updates[:-1] for answer in answers if answer.state == "answering")
    notes = [answers[0].note for answers in updates if answers[0].state == "answering"]
    assert notes[0].endswith(" of 24 answered")
    for side, name in enumerate((None, ONE)):
        single = [sample_texts(ask(worker, name, question=question))[0][0] for question in questions[:3]]
        assert [sample.text for sample in updates[-1][side].samples] == single * 8


def test_speed_and_rendered_prompt(runs_and_texts, worker):
    """The speed of a side counts its own decode steps only."""
    start_time = time.monotonic()
    base, endless = ask(worker, None, ENDLESS, max_tokens=200)
    seconds = time.monotonic() - start_time
    assert 0 < base.seconds + endless.seconds <= seconds
    tokens = len(endless.samples[0].token_ids)
    assert endless.tokens_per_second == pytest.approx(tokens / endless.seconds)
    assert QUESTION in base.prompt and SYSTEM not in base.prompt and SYSTEM in endless.prompt
    (answer,) = ask(worker, None, system_prompt="Be brief.")
    assert "Be brief." in answer.prompt


def test_samples_match_a_roll_out(runs_and_texts, worker):
    _, texts = runs_and_texts
    sampling = {"samples": 5, "temperature": 1.0, "top_p": 0.9, "seed": 7}
    answers = ask(worker, ONE, None, **sampling)
    assert sample_texts(answers)[0] == texts["sampled"]
    repeated = ask(worker, ONE, None, **sampling)
    other_seed = ask(worker, ONE, None, **sampling | {"seed": 8})
    assert sample_texts(repeated) == sample_texts(answers) != sample_texts(other_seed)
    (sample,) = ask(worker, ENDLESS, max_tokens=3)[0].samples
    assert sample.truncated and sample.finished and len(sample.token_ids) == 3


def test_base_gets_the_system_prompt_of_the_run(runs_and_texts, worker):
    _, texts = runs_and_texts
    assert sample_texts(ask(worker, None, run="endless"))[0] == texts["base with a system prompt"]


def test_text_includes_the_thinking_prefix_of_the_template(runs_and_texts, worker, monkeypatch):
    _, texts = runs_and_texts
    monkeypatch.setattr("rl.model.policy.Policy.completion_prefix", lambda self, prompt: "<think>\n")
    assert sample_texts(ask(worker, None))[0] == ["<think>\n" + texts["base"][0]]


def test_broken_or_mismatched_adapter_fails_one_side(runs_and_texts, worker, tmp_path):
    """The side with the adapter shows an error, and the other one answers."""
    runs, texts = runs_and_texts
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
        base, broken = ask(worker, None, ("one", folder.name))
        assert sample_texts([base]) == [texts["base"]]
        assert broken.state == "failed" and broken.note.startswith("adapter: ") and folder.name in broken.note, name
        assert "\n" not in broken.note
    assert set(worker.models.policy.model.peft_config) == {"default", *worker.models.adapters.values()}
    assert sample_texts(ask(worker, None, ONE)) == [texts["base"], texts["one"]]
    for folder in folders.values():
        shutil.rmtree(folder)


def test_checkpoint_of_another_base_fails(runs_and_texts, worker):
    runs, texts = runs_and_texts
    policy = load_policy(Config(device="cpu"))
    del policy.model.get_base_model().model.layers[3]
    make_run(runs.folder, "shorter", policy)
    answers = ask(worker, None, ("shorter", "step_000001"))
    assert answers[1].state == "failed" and "data/tiny" in answers[1].note
    assert sample_texts(answers[:1]) == [texts["base"]]


def test_many_checkpoints(runs_and_texts, worker, monkeypatch):
    """Unused adapters are dropped, and a checkpoint that has changed on disk is reloaded."""
    monkeypatch.setattr(models, "MAX_ADAPTERS", 2)
    runs, texts = runs_and_texts
    first = runs.folder / "one/checkpoints/step_000001"
    for i in range(2, 6):
        shutil.copytree(first, first.with_name(f"step_00000{i}"))
    for i in (1, 2, 3, 4, 5, 1):
        assert sample_texts(ask(worker, None, ("one", f"step_00000{i}"))) == [texts["base"], texts["one"]]
        assert len(worker.models.policy.model.peft_config) <= 1 + 2
    endless = (runs.folder / "endless/checkpoints/step_000001/adapter_model.safetensors").read_bytes()
    (first.with_name("step_000005") / "adapter_model.safetensors").write_bytes(endless)
    assert sample_texts(ask(worker, ("one", "step_000005")))[0] != texts["one"]
    for i in range(2, 6):
        shutil.rmtree(first.with_name(f"step_00000{i}"))


def test_errors_are_reported_and_end_only_their_question(runs_and_texts, worker, monkeypatch):
    from rl.model import engine

    runs, texts = runs_and_texts
    original_init = engine.Engine.__init__

    def init_without_memory(self, policy, prompts, n, *rest):
        if n == 16:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        original_init(self, policy, prompts, n, *rest)

    monkeypatch.setattr(engine.Engine, "__init__", init_without_memory)
    (answer,) = ask(worker, None, samples=16)
    assert answer.state == "failed" and answer.note.startswith("Out of memory. ") and "now 16" in answer.note
    notes = {
        "no run": ask(worker, ("nowhere", "step_000001"))[0].note,
        "no checkpoint": ask(worker, ("one", "../../../etc"))[0].note,
        "too long": ask(worker, None, question="1 + " * 400)[0].note,
    }
    assert "'nowhere'" in notes["no run"]
    assert notes["no checkpoint"] == "one has no checkpoint '../../../etc'. It has step_000001."
    assert "context length of the model is 512" in notes["too long"]
    (runs.folder / "invalid").mkdir()
    (runs.folder / "invalid/config.yaml").write_text("model: nobody/nothing\ndevice: cpu\n")
    assert ask(worker, None, run="invalid")[0].note.startswith("model: nobody/nothing ")
    (runs.folder / "invalid/config.yaml").write_text("modle: data/tiny\n")
    assert "modle" in ask(worker, None, run="invalid")[0].note
    shutil.rmtree(runs.folder / "invalid")
    assert sample_texts(ask(worker, None, ONE)) == [texts["base"], texts["one"]]


def test_training_run_keeps_the_gpu(runs_and_texts, worker, monkeypatch):
    config = Config(device="auto", dtype="bfloat16")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert (
        worker.models.choose_device(config) == "cuda"
        and worker.models.choose_device(dataclasses.replace(config, device="cpu")) == "cpu"
    )
    monkeypatch.setattr(models.Models, "run_on_gpu", lambda self: "one")
    assert worker.models.choose_device(config) == "cpu"
    with pytest.raises(models.UiError, match="one is training on the GPU.*Qwen/Qwen3-8B"):
        worker.models.choose_device(Config(model="Qwen/Qwen3-8B"))
