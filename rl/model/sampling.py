"""How the next token is drawn from the logits: temperature, repetition penalty, top-k, top-p, min-p."""

from dataclasses import dataclass

import torch

from rl.config import Config

# Completions that have ended, by their place in a roll-out: token ids, log-probabilities, whether it was cut.
Ended = dict[int, tuple[list[int], list[float], bool]]


@dataclass
class Sampling:
    """How the next token is drawn. temperature 0 is greedy (for evaluation only)."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    @classmethod
    def from_config(cls, config: Config) -> "Sampling":
        """The settings of the training roll-out."""
        return cls(config.temperature, config.top_k, config.top_p, config.min_p, config.repetition_penalty)


def sample(
    logits: torch.Tensor, sampling: Sampling, generator: torch.Generator, seen: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw one token a row from logits (B, V): the tokens (B,) and their log-probabilities (B,) fp32.

    The log-probability is that of the temperature-scaled distribution, before repetition penalty, top-k, top-p and
    min-p, which are applied in this order. seen: the tokens that the repetition penalty looks at, (B, V) bool.
    """
    logits = logits.float()
    if sampling.temperature == 0:
        token = logits.argmax(-1)
        return token, logits.log_softmax(-1).gather(1, token[:, None]).squeeze(1)
    logits = logits / sampling.temperature
    logprobs = logits.log_softmax(-1)  # (B, V)
    if sampling.repetition_penalty != 1 and seen is not None:
        rarer = torch.where(logits > 0, logits / sampling.repetition_penalty, logits * sampling.repetition_penalty)
        logits = torch.where(seen, rarer, logits)
        probabilities = logits.softmax(-1)  # (B, V)
    else:
        probabilities = logprobs.exp()
    if 0 < sampling.top_k < logits.shape[-1]:
        smallest = probabilities.topk(sampling.top_k).values[:, -1:]
        probabilities = torch.where(probabilities < smallest, 0.0, probabilities)
    if sampling.top_p < 1:
        ordered, order = probabilities.sort(-1, descending=True)
        ordered = ordered / ordered.sum(-1, keepdim=True)
        outside = ordered.cumsum(-1) - ordered >= sampling.top_p  # the token that crosses top_p stays
        probabilities = probabilities.masked_fill(outside.scatter(1, order, outside), 0.0)
    if sampling.min_p > 0:
        floor = sampling.min_p * probabilities.max(-1, keepdim=True).values
        probabilities = torch.where(probabilities < floor, 0.0, probabilities)
    draw = draw_by_race if logits.is_cuda else draw_by_inversion
    token = draw(probabilities, generator)
    return token, logprobs.gather(1, token[:, None]).squeeze(1)


def draw_by_inversion(probabilities: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """One token a row, (B,), where the cumulated probabilities (B, V) pass a uniform number: one random number a row.

    On a CPU ten times faster than torch.multinomial, which draws one for every token of the vocabulary.
    """
    cumulated = probabilities.cumsum(-1)
    uniform = torch.rand(len(probabilities), 1, generator=generator, device=probabilities.device)
    threshold = cumulated[:, -1:] * uniform * (1 - 2**-20)  # below the sum also after rounding
    token = torch.searchsorted(cumulated, threshold, right=True).squeeze(1)
    return token.clamp(max=probabilities.shape[1] - 1)  # beyond it only where they are nan, which the caller sees


def draw_by_race(probabilities: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """One token a row, (B,): the first of exponential waiting times with these rates (B, V).

    No sum over a large vocabulary, whose order differs between kernels, and nothing that a CUDA graph cannot hold.
    """
    waiting = torch.empty_like(probabilities).exponential_(generator=generator)
    return (probabilities / waiting).argmax(-1)
