"""Sampling the next token from logits: temperature, repetition penalty, top-k, top-p, min-p."""

from dataclasses import dataclass

import torch

from rl.config import Config

BLOCK = 128  # tokens in a block of `draw_by_inversion`
# Finished completions by index in the roll-out: token ids, log-probabilities, and whether the completion is truncated.
# The log-probability of a token is None if it comes from an environment.
Finished = dict[int, tuple[list[int], list[float | None], bool]]


@dataclass
class Sampling:
    """Sampling parameters. Temperature 0 is greedy decoding, for evaluation only."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    @classmethod
    def from_config(cls, config: Config) -> "Sampling":
        """Return the parameters of the training roll-out."""
        return cls(config.temperature, config.top_k, config.top_p, config.min_p, config.repetition_penalty)


def sample(
    logits: torch.Tensor, sampling: Sampling, generator: torch.Generator, seen: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sample one token per row from logits (B, V). Returns the tokens (B,) and their log-probabilities (B,) in fp32.

    Log-probabilities refer to the temperature-scaled distribution, before repetition penalty, top-k, top-p and min-p,
    which are applied in this order. seen: the tokens that the repetition penalty applies to, (B, V) bool.
    """
    logits = logits.float()
    if sampling.temperature == 0:
        token = logits.argmax(-1)
        return token, logits.log_softmax(-1).gather(1, token[:, None]).squeeze(1)
    if sampling.temperature != 1:
        logits = logits / sampling.temperature
    unpenalized = probabilities = logits.softmax(-1)  # (B, V)
    if sampling.repetition_penalty != 1 and seen is not None:
        lowered = torch.where(logits > 0, logits / sampling.repetition_penalty, logits * sampling.repetition_penalty)
        probabilities = torch.where(seen, lowered, logits).softmax(-1)
    if 0 < sampling.top_k < logits.shape[-1]:
        smallest = probabilities.topk(sampling.top_k).values[:, -1:]
        probabilities = torch.where(probabilities < smallest, 0.0, probabilities)
    if sampling.top_p < 1:
        ordered, order = probabilities.sort(-1, descending=True)
        ordered = ordered / ordered.sum(-1, keepdim=True)
        outside = ordered.cumsum(-1) - ordered >= sampling.top_p  # the token that crosses top_p stays eligible
        probabilities = probabilities.masked_fill(outside.scatter(1, order, outside), 0.0)
    if sampling.min_p > 0:
        floor = sampling.min_p * probabilities.max(-1, keepdim=True).values
        probabilities = torch.where(probabilities < floor, 0.0, probabilities)
    draw = draw_by_race if logits.is_cuda else draw_by_inversion
    token = draw(probabilities, generator)
    return token, unpenalized.gather(1, token[:, None]).squeeze(1).log()


def draw_by_inversion(probabilities: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Sample one token per row, (B,), by inverting the cumulative distribution of the probabilities (B, V).

    This needs one random number per row; torch.multinomial draws one for every token of the vocabulary. First a block of
    tokens is drawn, then a token of the block, because cumulative sums over the whole vocabulary are slow.
    """
    rows = torch.arange(len(probabilities), device=probabilities.device)
    block_size = BLOCK if probabilities.shape[1] % BLOCK == 0 else probabilities.shape[1]
    blocks = probabilities.view(len(rows), -1, block_size)  # (B, V / block size, block size)
    below_one = 1 - 2**-20  # keeps thresholds below the sum after rounding
    cumulative = blocks.sum(-1).cumsum(-1)
    uniform = torch.rand(len(rows), 1, generator=generator, device=probabilities.device)
    threshold = cumulative[:, -1:] * uniform * below_one
    # Indices are out of range only for nan, which the caller detects.
    block = torch.searchsorted(cumulative, threshold, right=True).squeeze(1).clamp(max=blocks.shape[1] - 1)
    before = torch.where(block > 0, cumulative[rows, block - 1], 0.0)[:, None]
    within = blocks[rows, block].cumsum(-1)  # (B, block size)
    threshold = torch.minimum((threshold - before).clamp(min=0), within[:, -1:] * below_one)
    token = torch.searchsorted(within, threshold, right=True).squeeze(1).clamp(max=block_size - 1)
    return block * block_size + token


def draw_by_race(probabilities: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Sample one token per row, (B,): the shortest of exponential waiting times with the probabilities (B, V) as rates.

    It works in a CUDA graph, and it has no sum over the vocabulary, whose order would differ between kernels.
    """
    waiting_times = torch.empty_like(probabilities).exponential_(generator=generator)
    return (probabilities / waiting_times).argmax(-1)
