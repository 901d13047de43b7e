"""Attention over packed tokens: packed and padded layouts, masks, and prompts shared by several rows.

The g query heads of a key-value head are laid out as g times as many queries of one head. Grouped-query attention then
needs no copies of keys and values, and one masked kernel serves prefill, decoding and the update. A mask has rows x
queries x keys elements; `max_tokens_per_micro_batch` bounds it, and it is costly for prompts of many thousand tokens.
Shapes: T packed tokens, B rows, W padded width of a row, L queries, S keys, d head size.
"""

import torch
import torch.nn.functional as F

from rl.model.decoder import Decoder, Layer

FEW_QUERIES = 16  # a decode step has g queries for each key-value head


def attention(query, key, value, mask: torch.Tensor, scaling: float) -> torch.Tensor:
    """Return softmax attention of query (B, kv heads, g L, d), key and value (B, kv heads, S, d), in the query's shape.

    mask: additive, from `masks_by_window`. scaling: factor of the dot products.
    """
    mask = mask.expand(len(query), query.shape[1], -1, -1)
    if not query.is_cuda and query.shape[2] <= FEW_QUERIES and not torch.is_grad_enabled():
        # The fused CPU kernel is optimized for long queries; in a decode step two matrix products take half the time.
        mask, query_rows, keys = mask.flatten(0, 1), query.flatten(0, 1), key.flatten(0, 1)
        if query.dtype == torch.bfloat16:  # its product with transposed keys copies them
            scores = torch.bmm(keys, (query_rows * scaling).mT).mT + mask
        else:
            scores = torch.baddbmm(mask, query_rows, keys.mT, alpha=scaling)
        return torch.bmm(scores.softmax(-1), value.flatten(0, 1)).view(query.shape)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling)


def causal(width: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return causal visibility and the distance from query to key, each (1, W, W), for `masks_by_window`."""
    position = torch.arange(width, device=device)
    distance = (position[:, None] - position)[None]
    return distance >= 0, distance


def masks_by_window(decoder: Decoder, visible: torch.Tensor, distance: torch.Tensor) -> dict[int | None, torch.Tensor]:
    """Return an additive mask (B, 1, g L, S), -inf on invisible keys, for each sliding window of the model's layers.

    visible: (B, L, S) bool, the keys that a query attends to without a window. distance: (B, L, S), from key to query.
    """
    masks = {}
    group_size = decoder.heads // decoder.kv_heads
    for window in {layer.window for layer in decoder.layers}:
        valid = visible if window is None else visible & (distance < window)
        mask = torch.zeros(valid.shape, dtype=decoder.dtype, device=valid.device).masked_fill_(~valid, -torch.inf)
        masks[window] = mask[:, None].expand(-1, group_size, -1, -1).reshape(len(mask), 1, -1, mask.shape[-1])
    return masks


def round_up(width: int, device: torch.device) -> int:
    """Round a width up to a multiple of 16 on CUDA, whose kernels would otherwise copy a mask to align it."""
    return -(-width // 16) * 16 if device.type == "cuda" else width


class Rows:
    """Converts between packed tokens and right-padded rows. Padding is determined by lengths, never by token ids.

    aligned: round the padded width up for the attention kernels (`round_up`); otherwise it is the longest row's length.
    """

    def __init__(self, lengths: list[int], device: torch.device, aligned: bool = False):
        self.lengths = torch.tensor(lengths, device=device)  # (B,)
        self.width = max(1, max(lengths))
        if aligned:
            self.width = round_up(self.width, device)
        self.mask = torch.arange(self.width, device=device) < self.lengths[:, None]  # (B, W) True on tokens
        self.cells = self.mask.flatten().nonzero()[:, 0]  # (T,) index of each token in the flattened rows
        self.row, self.column = self.cells // self.width, self.cells % self.width  # (T,)

    def pad(self, x: torch.Tensor) -> torch.Tensor:
        """Convert packed values (T, ...) to rows (B, W, ...), padded with zeros."""
        rows = x.new_zeros(self.mask.numel(), *x.shape[1:]).index_copy(0, self.cells, x)
        return rows.view(*self.mask.shape, *x.shape[1:])

    def pack(self, x: torch.Tensor) -> torch.Tensor:
        """Convert rows (B, W, ...) to packed values (T, ...)."""
        return x.flatten(0, 1).index_select(0, self.cells)

    def pad_heads(self, x: torch.Tensor, kv_heads: int) -> torch.Tensor:
        """Convert packed queries, keys or values (T, heads, d) to (B, kv heads, g W, d), with g = heads / kv heads."""
        rows = self.pad(x.unflatten(1, (kv_heads, x.shape[1] // kv_heads)))  # (B, W, kv heads, g, d)
        return rows.permute(0, 2, 3, 1, 4).flatten(2, 3)

    def pack_heads(self, x: torch.Tensor) -> torch.Tensor:
        """Convert the output of `attention` (B, kv heads, g W, d) to packed values (T, heads d)."""
        x = x.view(*x.shape[:2], -1, self.width, x.shape[-1])  # (B, kv heads, g, W, d)
        return self.pack(x.permute(0, 3, 1, 2, 4).flatten(2))


class SharedPrompts:
    """A packed micro-batch for the update, in which rows with equal prompts share one copy of the prompt.

    `ids` holds the tokens of the distinct prompts, then the completions. A completion token attends to its prompt
    and to the completion up to itself. Usage: `decoder.forward(packed.ids, packed.positions, packed.attend)`.

    prompts, completions: token ids of each row.
    """

    def __init__(self, decoder: Decoder, prompts: list[list[int]], completions: list[list[int]]):
        self.kv_heads, device = decoder.kv_heads, decoder.embedding.weight.device
        index_by_prompt: dict[tuple, int] = {}
        prompt_index = [index_by_prompt.setdefault(tuple(prompt), len(index_by_prompt)) for prompt in prompts]
        unique = list(index_by_prompt)
        self.ids = torch.tensor([token for row in (*unique, *completions) for token in row], device=device)  # (T,)
        self.prompts, self.completions = (
            Rows([len(row) for row in rows], device, aligned=True) for rows in (unique, completions)
        )
        self.prompt_index = torch.tensor(prompt_index, device=device)  # (B,) prompt of each completion
        starts = self.prompts.lengths[self.prompt_index]  # (B,) first position of each completion
        self.positions = torch.cat([self.prompts.column, starts[self.completions.row] + self.completions.column])
        decoder.prepare(int(self.positions.max()) + 1)

        # Padding attends to some keys, too: otherwise its softmax, and with it every gradient, would be nan.
        p, c = (torch.arange(rows.width, device=device, dtype=torch.int32) for rows in (self.prompts, self.completions))
        query_positions = starts[:, None].int() + c  # (B, C)
        key_positions = torch.cat([p.expand(len(starts), -1), query_positions], 1)  # (B, P + C)
        is_prompt = (p < starts[:, None])[:, None].expand(-1, len(c), -1)  # (B, C, P)
        visible = torch.cat([is_prompt, (c <= c[:, None]).expand(len(starts), -1, -1)], 2)  # (B, C, P + C)
        distance = query_positions[:, :, None] - key_positions[:, None]
        prompt_masks = masks_by_window(decoder, *causal(self.prompts.width, device))
        completion_masks = masks_by_window(decoder, visible, distance)
        self.masks = {window: (prompt_masks[window], completion_masks[window]) for window in prompt_masks}

    def state_indices(self) -> torch.Tensor:
        """Return packed indices of the last prompt token and the tokens of each completion, (sum of lengths + B,)."""
        sizes = self.completions.lengths
        counts = sizes + 1
        row = torch.arange(len(counts), device=counts.device).repeat_interleave(counts)
        step = (
            torch.arange(len(row), device=counts.device) - (counts.cumsum(0) - counts)[row]
        )  # 0: the prompt's last token
        ends = self.prompts.lengths.cumsum(0)
        first = ends[-1] + sizes.cumsum(0) - sizes  # (B,)
        return torch.where(step == 0, (ends - 1)[self.prompt_index][row], first[row] + step - 1)

    def attend(self, layer: Layer, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Return the attention output of a layer for all packed tokens, (T, heads d)."""
        prompt_mask, completion_mask = self.masks[layer.window]
        n = len(self.prompts.cells)
        prompt_qkv = [self.prompts.pad_heads(x[:n], self.kv_heads) for x in (query, key, value)]
        completion_qkv = [self.completions.pad_heads(x[n:], self.kv_heads) for x in (query, key, value)]
        prompt_output = attention(*prompt_qkv, prompt_mask, layer.scaling)
        keys, values = (
            torch.cat([prompt_qkv[i].index_select(0, self.prompt_index), completion_qkv[i]], 2) for i in (1, 2)
        )  # (B, kv heads, P + C, d)
        completion_output = attention(completion_qkv[0], keys, values, completion_mask, layer.scaling)
        return torch.cat([self.prompts.pack_heads(prompt_output), self.completions.pack_heads(completion_output)])
