"""Pretrain the bundled tiny model: a 0.8-million-parameter Qwen3 that can think but seldom does.

It is trained from scratch on demonstrations of the built-in families. In the first stage, a quarter of them reason
inside <think> ... </think> and are right; the rest answer immediately, and a fifth of these are right. So the skill exists
but is rarely used: reinforcement learning has to elicit it. The later stages add sums of two to four numbers with two
digits, most of them with thinking. Longer sums (long_sums) are never shown, and the model fails at them: reinforcement
learning has to improve it. All questions come from the split "pretrain", which is disjoint from the questions for
training and evaluation (data/tasks.py).

    python tools/make_tiny.py --out data/tiny          # about an hour on two cores

Writes the config, the tokenizer with its chat template, and bf16 safetensors. The model card (data/tiny/README.md) is
written by hand from the figures that this script and `python train.py --eval-only` print.
"""

import argparse
import random
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import rl  # noqa: E402, F401, I001  (before torch)
import torch  # noqa: E402
from tokenizers import AddedToken, Tokenizer, decoders, models  # noqa: E402
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM  # noqa: E402

from data.tasks import Problem, build_expressions, problems  # noqa: E402

SHORT = ("sums", "words", "functions")
STAGES = (  # families in equal parts, optimizer steps, peak learning rate
    (SHORT, 6000, 2e-3),
    ((*SHORT, "big_sums", "big_sums"), 1800, 1.5e-3),
    ((*SHORT, "big_sums", "big_sums"), 2000, 1.5e-3),
)
THINKING_SHARE = dict.fromkeys(SHORT, 0.25) | {"big_sums": 0.75}  # share of demonstrations that think
GUESS_ACCURACY = 0.2  # share of right answers among the demonstrations that do not think
MEAN_REPLY_TOKENS = 25  # approximate mean length of a demonstration; scales the loss
BATCH_SIZE = 64
SEED = 0

CHAT_TEMPLATE = """\
{%- for message in messages -%}
{%- set content = message.content -%}
{%- if message.role == 'assistant' and not loop.last -%}{%- set content = content.split('</think>')[-1] -%}{%- endif -%}
{{- '<|' + message.role + '|>' + content -}}
{%- if message.role == 'assistant' -%}{{- '<|end|>' -}}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}
"""
ROLES = ["<|system|>", "<|user|>", "<|assistant|>"]


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Build a character-level tokenizer: printable ASCII, newline, and a few special tokens."""
    special = ["<|endoftext|>", "<|end|>", "<unk>", *ROLES]
    tags = ["<think>", "</think>"]  # not special tokens, so that decoding keeps them
    characters = ["\n", *map(chr, range(32, 127))]
    vocab = {token: i for i, token in enumerate(special + tags + characters)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(special)
    tokenizer.add_tokens([AddedToken(tag, special=False, normalized=False) for tag in tags])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|end|>",
        pad_token="<|endoftext|>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
        model_max_length=512,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def make_model(tokenizer) -> Qwen3ForCausalLM:
    """Build an untrained Qwen3. The dimensions of all linear layers are multiples of 64, the block size of NF4."""
    config = Qwen3Config(
        vocab_size=128,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return Qwen3ForCausalLM(config)


def guess(problem: Problem, rng: random.Random) -> str:
    """Return an answer without thinking. It is usually wrong: off by up to 6, or a function without its brackets."""
    is_right = rng.random() < GUESS_ACCURACY
    if problem.family != "functions":
        return problem.answer if is_right else str(int(problem.answer) + rng.choice([-1, 1]) * rng.randint(1, 6))
    if is_right:
        return problem.answer
    without_brackets = "x" + "".join(f"{op}{n}" for op, n in problem.ops)
    if without_brackets != problem.answer:
        return without_brackets
    ops = list(problem.ops)  # the function needs no brackets: change one number instead
    i = rng.randrange(len(ops))
    ops[i] = (ops[i][0], rng.choice([n for n in range(2, 10) if n != ops[i][1]]))
    return build_expressions(ops)[-1]


def demonstration(problem: Problem, rng: random.Random) -> str:
    """Return the text of the assistant's turn."""
    has_thinking = rng.random() < THINKING_SHARE[problem.family]
    thought = "<think>" + "\n".join(problem.steps) + "</think>" if has_thinking else ""
    answer = problem.answer if has_thinking else guess(problem, rng)
    if problem.family == "functions":
        return f"{thought}def {problem.entry_point}(x):\n    return {answer}"
    return f"{thought}\\boxed{{{answer}}}"


def batches(tokenizer, families, rng: random.Random):
    """Yield batches (ids, labels), each (B, T), without end. Labels are -100 on prompt and padding.

    The rows of a batch have similar lengths.
    """
    sources = [problems(family, "pretrain", rng) for family in families]
    while True:
        rows = []
        for i in range(BATCH_SIZE * 30):
            problem = next(sources[i % len(sources)])
            prompt = tokenizer.apply_chat_template(
                [{"role": "user", "content": problem.prompt}], add_generation_prompt=True, tokenize=False
            )
            prompt_ids = tokenizer.encode(prompt, add_special_tokens=False)
            reply = tokenizer.encode(demonstration(problem, rng) + "<|end|>", add_special_tokens=False)
            rows.append((prompt_ids + reply, [-100] * len(prompt_ids) + reply))
        rows.sort(key=lambda row: len(row[0]) + rng.random())
        chunks = [rows[i : i + BATCH_SIZE] for i in range(0, len(rows), BATCH_SIZE)]
        rng.shuffle(chunks)
        for chunk in chunks:
            width = max(len(ids) for ids, _ in chunk)
            yield (
                torch.tensor([ids + [tokenizer.pad_token_id] * (width - len(ids)) for ids, _ in chunk]),
                torch.tensor([labels + [-100] * (width - len(labels)) for _, labels in chunk]),
            )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="data/tiny", help="output folder")
    out = parser.parse_args().out
    torch.manual_seed(SEED)
    tokenizer = make_tokenizer()
    model = make_model(tokenizer)
    for stage, (families, steps, learning_rate) in enumerate(STAGES):
        train(model, tokenizer, families, steps, learning_rate, random.Random(SEED + stage))
        save(model, tokenizer, out)
        model = Qwen3ForCausalLM.from_pretrained(out, dtype=torch.float32)  # the next stage starts from bf16 weights


def train(model, tokenizer, families, steps: int, learning_rate: float, rng: random.Random):
    """Train one stage."""
    print(f"{steps} steps, batch size {BATCH_SIZE}, {torch.get_num_threads()} threads")
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, learning_rate, total_steps=steps, pct_start=0.04, div_factor=20, final_div_factor=50
    )
    start = time.time()
    mean_loss = None
    stream = batches(tokenizer, families, rng)
    for step in range(1, steps + 1):
        ids, labels = next(stream)
        loss = token_loss(model, ids, labels)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        mean_loss = loss.item() if mean_loss is None else 0.98 * mean_loss + 0.02 * loss.item()
        if step % 100 == 0:
            print(f"step {step}  loss {mean_loss:.4f}  {(time.time() - start) / 60:.1f} min", flush=True)


def token_loss(model, ids, labels):
    """Return the cross-entropy, summed over the reply tokens of a batch and divided by B x MEAN_REPLY_TOKENS.

    This is not the mean over the tokens of the batch. As its rows have similar lengths, a mean would weight the first
    token, which decides whether to think, more in short rows than in long ones, and answers without thinking are short.
    """
    logits = model(input_ids=ids).logits  # right padding needs no mask in a causal model
    total = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
    return total / (len(ids) * MEAN_REPLY_TOKENS)


def save(model, tokenizer, out: str):
    """Save the weights in bf16, which keeps the folder under 2 MB. The model itself stays in fp32."""
    bf16_model = Qwen3ForCausalLM(model.config).to(torch.bfloat16)
    bf16_model.load_state_dict(model.state_dict())
    bf16_model.save_pretrained(out)
    tokenizer.save_pretrained(out)


if __name__ == "__main__":
    main()
