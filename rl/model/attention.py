"""Attention over packed tokens: where they stand in padded rows, what each of them sees, and prompts that rows share.

The query heads of a key-value head stand in line as queries of one, so that grouped-query attention needs no copies of keys
and values, and one kernel with a mask serves prefill, decoding and the update. A mask is as large as rows x queries x
keys: what max_tokens_per_micro_batch bounds, and what a prompt of many thousand tokens would feel.
"""

import torch
import torch.nn.functional as F

from rl.model.decoder import Decoder, Layer

FEW_QUERIES = 16  # a decode step has as many as query heads for a key-value head


def attention(query, key, value, mask: torch.Tensor, scaling: float) -> torch.Tensor:
    """Softmax attention, (B, kv heads, g T, d): the g query heads of a key-value head stand in line as queries.

    query (B, kv heads, g T, d), key and value (B, kv heads, S, d), mask as in `masks_by_window`.
    """
    mask = mask.expand(len(query), query.shape[1], -1, -1)
    if not query.is_cuda and query.shape[2] <= FEW_QUERIES and not torch.is_grad_enabled():
        # The CPU's fused kernel is made for long queries; for those of a decode step two products take half the time.
        scores = torch.baddbmm(mask.flatten(0, 1), query.flatten(0, 1), key.flatten(0, 1).mT, alpha=scaling)
        return torch.bmm(scores.softmax(-1), value.flatten(0, 1)).view(query.shape)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling)


def causal(width: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """What a row's token sees, (1, W, W), and how far back it lies."""
    position = torch.arange(width, device=device)
    distance = (position[:, None] - position)[None]
    return distance >= 0, distance


def masks_by_window(decoder: Decoder, visible: torch.Tensor, distance: torch.Tensor) -> dict[int | None, torch.Tensor]:
    """Additive masks (B, 1, g T, S), -inf where nothing is seen, for each sliding window that a layer of the model has.

    visible, distance: (B, T, S), what a query may see at all, and its position less that of the key.
    """
    masks, group = {}, decoder.heads // decoder.kv_heads
    for window in {layer.window for layer in decoder.layers}:
        seen = visible if window is None else visible & (distance < window)
        mask = torch.zeros(seen.shape, dtype=decoder.dtype, device=seen.device).masked_fill_(~seen, -torch.inf)
        masks[window] = mask[:, None].expand(-1, group, -1, -1).reshape(len(mask), 1, -1, mask.shape[-1])
    return masks


def round_up(width: int, device: torch.device) -> int:
    """The width itself, or the next multiple of 16 on CUDA, whose kernels would else make an aligned copy of a mask."""
    return -(-width // 16) * 16 if device.type == "cuda" else width


class Rows:
    """Where packed tokens stand in right-padded rows. From lengths, never from token ids.

    aligned: for attention, as wide as its kernels want it (`round_up`); else as the longest row.
    """

    def __init__(self, lengths: list[int], device: torch.device, aligned: bool = False):
        self.lengths = torch.tensor(lengths, device=device)  # (B,)
        self.width = max(1, max(lengths))
        if aligned:
            self.width = round_up(self.width, device)
        self.mask = torch.arange(self.width, device=device) < self.lengths[:, None]  # (B, W) True on tokens
        self.cells = self.mask.flatten().nonzero()[:, 0]  # (N,) of each token in the flattened rows
        self.row, self.column = self.cells // self.width, self.cells % self.width  # (N,)

    def pad(self, x: torch.Tensor) -> torch.Tensor:
        """(N, ...) in rows (B, W, ...), zeros behind each."""
        rows = x.new_zeros(self.mask.numel(), *x.shape[1:]).index_copy(0, self.cells, x)
        return rows.view(*self.mask.shape, *x.shape[1:])

    def pack(self, x: torch.Tensor) -> torch.Tensor:
        """Rows (B, W, ...) as packed (N, ...)."""
        return x.flatten(0, 1).index_select(0, self.cells)

    def pad_heads(self, x: torch.Tensor, kv_heads: int) -> torch.Tensor:
        """Queries, keys or values (N, heads, d) as `attention` takes them: (B, kv heads, heads / kv heads x W, d)."""
        rows = self.pad(x.unflatten(1, (kv_heads, x.shape[1] // kv_heads)))  # (B, W, kv heads, g, d)
        return rows.permute(0, 2, 3, 1, 4).flatten(2, 3)

    def pack_heads(self, x: torch.Tensor) -> torch.Tensor:
        """Attended (B, kv heads, g W, d) as packed (N, heads d)."""
        x = x.view(*x.shape[:2], -1, self.width, x.shape[-1])  # (B, kv heads, g, W, d)
        return self.pack(x.permute(0, 3, 1, 2, 4).flatten(2))


class SharedPrompts:
    """Completions behind their prompts, packed, each prompt once however many completions follow it: for the update.

    prompts, completions: token ids, row by row; rows with equal prompts share one. `ids` holds first the prompts' tokens,
    then the completions'; `decoder.forward(packed.ids, packed.positions, packed.attend)` runs them. A completion's token
    sees its prompt and the completion up to itself.
    """

    def __init__(self, decoder: Decoder, prompts: list[list[int]], completions: list[list[int]]):
        self.kv_heads, device = decoder.kv_heads, decoder.embedding.weight.device
        numbers: dict[tuple, int] = {}
        prompt_of = [numbers.setdefault(tuple(prompt), len(numbers)) for prompt in prompts]
        unique = list(numbers)
        self.ids = torch.tensor([token for row in (*unique, *completions) for token in row], device=device)  # (N,)
        self.prompts, self.completions = (
            Rows([len(row) for row in rows], device, aligned=True) for rows in (unique, completions)
        )
        self.prompt_of = torch.tensor(prompt_of, device=device)  # (B,)
        behind = self.prompts.lengths[self.prompt_of]  # (B,) the first position of each completion
        self.positions = torch.cat([self.prompts.column, behind[self.completions.row] + self.completions.column])
        decoder.prepare(int(self.positions.max()) + 1)

        # What is seen. Padding sees something, too, or its softmax would be nan, and with it the gradient of all.
        p, c = (torch.arange(rows.width, device=device, dtype=torch.int32) for rows in (self.prompts, self.completions))
        query_positions = behind[:, None].int() + c  # (B, C)
        key_positions = torch.cat([p.expand(len(behind), -1), query_positions], 1)  # (B, P + C)
        is_prompt = (p < behind[:, None])[:, None].expand(-1, len(c), -1)  # (B, C, P)
        visible = torch.cat([is_prompt, (c <= c[:, None]).expand(len(behind), -1, -1)], 2)  # (B, C, P + C)
        distance = query_positions[:, :, None] - key_positions[:, None]
        of_prompts = masks_by_window(decoder, *causal(self.prompts.width, device))
        of_completions = masks_by_window(decoder, visible, distance)
        self.masks = {window: (of_prompts[window], of_completions[window]) for window in of_prompts}

    def before(self) -> torch.Tensor:
        """Packed places of the token before each completion's tokens, and of its last one: (sum of the lengths + B,)."""
        sizes = self.completions.lengths
        counts = sizes + 1
        row = torch.arange(len(counts), device=counts.device).repeat_interleave(counts)
        step = torch.arange(len(row), device=counts.device) - (counts.cumsum(0) - counts)[row]  # 0 is before the first
        ends = self.prompts.lengths.cumsum(0)
        first = ends[-1] + sizes.cumsum(0) - sizes  # (B,)
        return torch.where(step == 0, (ends - 1)[self.prompt_of][row], first[row] + step - 1)

    def attend(self, layer: Layer, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        of_prompts, of_completions = self.masks[layer.window]
        n = len(self.prompts.cells)
        shared = [self.prompts.pad_heads(x[:n], self.kv_heads) for x in (query, key, value)]
        own = [self.completions.pad_heads(x[n:], self.kv_heads) for x in (query, key, value)]
        prompts = attention(*shared, of_prompts, layer.scaling)
        keys, values = (
            torch.cat([shared[i].index_select(0, self.prompt_of), own[i]], 2) for i in (1, 2)
        )  # (B, kv heads, P + C, d)
        completions = attention(own[0], keys, values, of_completions, layer.scaling)
        return torch.cat([self.prompts.pack_heads(prompts), self.completions.pack_heads(completions)])
