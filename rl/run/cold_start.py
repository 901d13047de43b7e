"""The cold start: supervised training on demonstrations before the first roll-out (DeepSeek-R1, arXiv 2501.12948).

Reinforcement learning only amplifies answers that the model already gives at times. A model that never writes an answer
in the expected form earns nothing. One or two hundred demonstrations teach it the form.
"""

import dataclasses
import math
from collections import Counter

import torch

from rl.config import Config, ConfigError
from rl.model import distributed
from rl.model.logprobs import completion_logprobs
from rl.model.policy import Policy
from rl.model.tokens import choose_end_id
from rl.model.turns import render_replies
from rl.optimizer import Optimizer
from rl.rollout import Episode, sampled_mask
from rl.update import Updater, prompt_and_completion_ids

BATCH_SIZE = 8  # demonstrations in an optimizer step
WARMUP_RATIO = 0.1  # its first step has the learning rate 0
MIN_WARMUP_STEPS = 10  # fewer optimizer steps have no warm-up


class ColdStart:
    """Trains the policy's LoRA on demonstrations; afterwards, the policy is the reference of the reinforcement learning.

    Args:
        updater: Its micro-batches are used, but not its optimizer.
        rows: Demonstrations, each with `prompt` and `completion`.

    Raises:
        ConfigError: A demonstration does not fit the chat template or the model's context.
    """

    def __init__(self, updater: Updater, rows: list[dict], config: Config):
        self.updater = updater
        self.policy = updater.policy
        self.config = config
        self.episodes = encode_demonstrations(self.policy, rows)

    def state_dict(self) -> dict:
        return {"reference": self.policy.lora_weights("reference")}

    def load_state_dict(self, state: dict) -> None:
        self.policy.set_reference(state["reference"])

    def train(self) -> None:
        """Minimize the mean negative log-likelihood of the completions' tokens, for `sft_epochs` epochs."""
        config = self.config
        steps = config.sft_epochs * math.ceil(len(self.episodes) / BATCH_SIZE)
        settings = dataclasses.replace(
            config,
            max_steps=steps,
            num_iterations=1,
            num_mini_batches=1,
            lr_scheduler_type="linear",
            warmup_ratio=WARMUP_RATIO if steps >= MIN_WARMUP_STEPS else 0.0,
        )
        optimizer = Optimizer(self.policy.trainable_parameters(), config.sft_learning_rate, self.policy, settings)

        def backward(batch: list[Episode], totals: Counter) -> None:
            num_tokens = sum(episode.num_sampled for episode in batch)
            for micro_batch in self.updater.micro_batches(distributed.share(batch)):
                logprobs, mask, _ = completion_logprobs(self.policy, *prompt_and_completion_ids(micro_batch))  # (B, C)
                mask = sampled_mask(micro_batch).to(mask.device)
                loss = -torch.where(mask, logprobs, 0.0).sum() / num_tokens
                optimizer.backward(loss)
                totals["loss"] += loss.item()

        generator = torch.Generator().manual_seed(config.seed)
        for epoch in range(1, config.sft_epochs + 1):
            order = torch.randperm(len(self.episodes), generator=generator).tolist()
            losses = []
            for start in range(0, len(order), BATCH_SIZE):
                batch = [self.episodes[i] for i in order[start : start + BATCH_SIZE]]
                losses.append(self.updater.accumulate(optimizer, backward, batch)["loss"])
                if not math.isfinite(optimizer.step()):
                    raise ConfigError(
                        f"sft_learning_rate: the gradient of the cold start is not finite in epoch {epoch}: lower it (now "
                        f"{config.sft_learning_rate:g})"
                    )
            print(f"cold start  epoch {epoch}/{config.sft_epochs}  loss {sum(losses) / len(losses):.3f}", flush=True)
        self.policy.set_reference(self.policy.lora_weights())


def encode_demonstrations(policy: Policy, rows: list[dict]) -> list[Episode]:
    """Return demonstrations as episodes. Their completions end with the end token. Raises ConfigError."""
    end_id = choose_end_id(policy.tokenizer, policy.eos_ids)
    episodes = []
    for question in policy.encode(rows, needs_room=False):
        text = question.row["completion"].strip()
        prefix = question.completion_prefix.strip()  # "<think>", if the chat template writes it into the prompt
        if not text.startswith(prefix):
            raise ConfigError(
                f"sft_data: row {question.row['id']}: the chat template starts every completion with {prefix!r}, but this "
                "one does not start with it"
            )
        turns = question.row.get("turns") or [(text, "")]
        ids = []
        is_sampled = []
        for turn, reply in turns:
            turn_ids = [*policy.tokenizer.encode(turn.strip()[len(prefix) :], add_special_tokens=False), end_id]
            reply_ids = []
            if reply:
                template, prefix = render_replies(policy, [{"role": "user", "content": reply}])
                reply_ids = policy.tokenizer.encode(template, add_special_tokens=False)
            ids += turn_ids + reply_ids
            is_sampled += [True] * len(turn_ids) + [False] * len(reply_ids)
        episodes.append(Episode(question.prompt_ids, ids, [], truncated=False, is_sampled=is_sampled))
    longest = max(len(episode.prompt_ids) + len(episode.completion_ids) for episode in episodes)
    if policy.context_length and longest > policy.context_length:
        raise ConfigError(
            f"sft_data: a demonstration has {longest} tokens, but the model's context is {policy.context_length}"
        )
    return episodes
