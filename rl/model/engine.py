"""The roll-out engine for the families of rl/model/decoder.py, with continuous batching over the slots of a KV cache.

A prompt is prefilled once for its group, and its keys and values are copied to the slots of the group's completions.
Active rows always occupy the first slots: when a row finishes, the last row moves into its slot, and waiting groups are
appended. The cost of a step therefore depends on the active rows only. In episodes of several turns, the tokens of an
environment's reply are appended to the row's slot; while the environment works, the row keeps its slot. If memory allows, the LoRA is folded into
scratch weights during the roll-out. On CUDA a step, including sampling, is a CUDA graph, captured for each batch size.
"""

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch

from rl.config import ConfigError
from rl.model.attention import Rows, attention, causal, masks_by_window, round_up
from rl.model.decoder import Layer
from rl.model.oom import fits
from rl.model.policy import Policy
from rl.model.sampling import Finished, Sampling, sample

REFILL_SHARE = 1 / 8  # waiting groups are admitted together, once this share of the slots is free
PREFILL_TOKENS = 16384  # prompt tokens prefilled at a time
STEPS_PER_CHECK = 8  # decode steps on CUDA between checks for finished rows; each check synchronizes with the GPU
CACHE_GROWTH = 64  # minimum number of tokens by which the cache grows
SMALLEST_BATCH, SMALLEST_LENGTH = 8, 256  # smallest sizes of a CUDA graph; the next ones are powers of 2 times these


@dataclass
class Row:
    """A completion that is being generated."""

    index: int  # index in the result of the roll-out
    ids: list[int] = field(default_factory=list)
    logprobs: list[float | None] = field(default_factory=list)  # None for the tokens of an environment
    turn_start: int = 0  # index in `ids` of the current turn
    waits: bool = False  # for the environment

    def append_reply(self, reply: list[int]) -> None:
        self.ids += reply
        self.logprobs += [None] * len(reply)
        self.turn_start = len(self.ids)
        self.waits = False


class Engine:
    """Generates the completions of one roll-out. Call either `run` or `steps`, once."""

    def __init__(
        self,
        policy: Policy,
        prompts: list[list[int]],
        num_generations: int,
        max_completion_length: int,
        sampling: Sampling,
        generator: torch.Generator,
        max_rows: int,
        play=None,  # the environments of the roll-out (rl/model/play.py)
    ):
        self.play = play
        self.max_turn_length = play.max_turn_length if play else max_completion_length
        self.device = policy.device
        self.eos_ids = policy.eos_ids
        self.prompts = prompts
        self.group = num_generations
        self.max_completion_length = max_completion_length
        self.sampling = sampling
        self.generator = generator
        self.rows: list[Row] = []  # rows[i] occupies slot i
        self.slots = max(min(max_rows, len(prompts) * num_generations), num_generations)
        self.length = round_up(max(map(len, prompts)) + max_completion_length, self.device)  # maximum length of a row
        self.use_graphs = uses_graphs(self.device)
        self.decoder = policy.decoder
        while self.slots > self.group and not fits(self.cache_bytes(), self.device):
            self.slots = max(self.slots // 2, self.group)  # the remaining rows are generated later
        if self.decoder.can_fold() and fits(self.decoder.scratch_bytes() + self.cache_bytes(), policy.device):
            self.decoder = self.decoder.folded()
        self.decoder.prepare(self.length)

        decoder = self.decoder
        # Keys and values per layer, (2, slots, kv heads, length, d). One tensor per layer: the CPU allocator returns
        # larger blocks to the system at once, and allocating them again takes longer than the computation on them.
        shape = 2, self.slots, decoder.kv_heads, 0, decoder.head_dim
        self.cache = [torch.zeros(shape, device=self.device, dtype=decoder.dtype) for _ in decoder.layers]
        if self.use_graphs:
            self.reserve(self.length)  # CUDA graphs need a fixed address; without graphs the cache grows on demand
        self.token = torch.zeros(self.slots, dtype=torch.long, device=self.device)  # last token of each row
        self.position = torch.zeros_like(self.token)  # its position in the row
        self.seen = None
        if sampling.repetition_penalty != 1:
            vocabulary = decoder.embedding.num_embeddings
            self.seen = torch.zeros(self.slots, vocabulary, dtype=torch.bool, device=self.device)
        # Tensors with one entry per slot, modified in place.
        self.state = [state for state in (self.token, self.position, self.seen) if state is not None]
        self.graphs = {}

    def cache_bytes(self) -> int:
        """Return the memory of keys and values in bytes, with a row of the full length in every slot."""
        decoder = self.decoder
        per_token = 2 * len(decoder.layers) * decoder.kv_heads * decoder.head_dim * decoder.dtype.itemsize
        return self.slots * self.length * per_token

    def run(self) -> Iterator[Finished]:
        """Yield completions as they finish, by index. Those of prompt i start at index i * num_generations."""
        for finished in self.steps():
            if finished:
                yield finished

    def steps(self) -> Iterator[Finished]:
        """Yield the newly finished completions after every decode step, even if there are none.

        Between two steps, `rows` holds the unfinished completions.
        """
        waiting = deque(enumerate(self.prompts))
        while waiting or self.rows:
            free = self.slots - len(self.rows)
            finished = {}
            if waiting and (not self.rows or free >= max(self.group, REFILL_SHARE * self.slots)):
                groups = [waiting.popleft() for _ in range(min(len(waiting), free // self.group))]
                logits = self.admit(groups)
                slots = range(len(self.rows) - len(logits), len(self.rows))
                finished = self.collect_finished(slots, *self.draw(slots, logits))
            elif not all(row.waits for row in self.rows):
                self.hold_waiting()
                tokens, logprobs = self.step()
                finished = self.collect_finished(range(len(self.rows)), tokens, logprobs)
            if any(row.waits for row in self.rows):
                finished |= self.continue_rows()
            yield finished

    def allocate_peak(self) -> None:
        """Allocate the peak memory of the roll-out: fill the slots with groups and decode one step at full length."""
        groups = list(enumerate(self.prompts))[: self.slots // self.group]
        logits = self.admit(groups)
        self.draw(range(len(self.rows)), logits)
        for row in self.rows:
            row.ids = [0] * (self.max_completion_length - 1)
        self.reserve(self.used_length())
        self.step()

    # --- admitting and removing rows

    def admit(self, groups: list[tuple[int, list[int]]]) -> torch.Tensor:
        """Prefill each prompt once, and add its group to the next free slots.

        groups: index and token ids of each prompt. Returns the logits for the first token of each new row, (rows, V).
        """
        max_prompts = max(1, PREFILL_TOKENS // max(len(prompt) for _, prompt in groups))
        logits = []
        for start in range(0, len(groups), max_prompts):
            part = groups[start : start + max_prompts]
            slots = slice(len(self.rows), len(self.rows) + len(part) * self.group)
            logits.append(self.prefill([prompt for _, prompt in part], slots))
            for prompt_index, _ in part:
                self.rows += [Row(prompt_index * self.group + i) for i in range(self.group)]
        return torch.cat(logits).repeat_interleave(self.group, 0)

    def prefill(self, prompts: list[list[int]], slots: slice) -> torch.Tensor:
        """Run the prompts, and copy their keys and values to the slots of their groups. Returns logits (prompts, V)."""
        rows = Rows([len(prompt) for prompt in prompts], self.device, aligned=True)
        group = self.group
        masks = masks_by_window(self.decoder, *causal(rows.width, self.device))
        self.reserve(min(rows.width + CACHE_GROWTH, self.length))

        def attend(layer: Layer, query, key, value):
            query, keys, values = (rows.pad_heads(x, self.decoder.kv_heads) for x in (query, key, value))
            for kind, x in enumerate((keys, values)):
                self.cache[layer.index][kind, slots, :, : rows.width] = x.repeat_interleave(group, 0)
            return rows.pack_heads(attention(query, keys, values, masks[layer.window], layer.scaling))

        ids = torch.tensor([token for prompt in prompts for token in prompt], device=self.device)  # (T,)
        states = self.decoder.forward(ids, rows.column, attend)
        self.position[slots] = (rows.lengths - 1).repeat_interleave(group)
        if self.seen is not None:
            prompt_tokens = torch.zeros(len(prompts), self.seen.shape[1], dtype=torch.bool, device=self.device)
            prompt_tokens[rows.row, ids] = True
            self.seen[slots] = prompt_tokens.repeat_interleave(group, 0)
        return self.decoder.head(states[rows.lengths.cumsum(0) - 1])[0]

    def collect_finished(self, slots: Iterable[int], tokens: torch.Tensor, logprobs: torch.Tensor) -> Finished:
        """Append sampled tokens, (steps, rows), to the rows in these slots, and remove and return the finished rows.

        Tokens sampled after a row or a turn has ended are dropped. A row whose turn has ended waits for its environment.
        """
        finished = {}
        free_slots = []
        for slot, ids, values in zip(slots, tokens.T.tolist(), logprobs.T.tolist()):
            row = self.rows[slot]
            if row.waits:
                continue
            for token, logprob in zip(ids, values):
                if logprob != logprob:
                    raise ConfigError(
                        f"dtype: the model's logits are nan in {self.decoder.dtype}: set dtype to float32 or bfloat16"
                    )
                row.ids.append(token)
                row.logprobs.append(logprob)
                stopped = token in self.eos_ids
                turn = row.ids[row.turn_start :]
                if stopped and self.play:
                    self.play.end_turn(row.index, turn)
                    row.waits = True
                    break
                if stopped or len(row.ids) == self.max_completion_length or len(turn) >= self.max_turn_length:
                    if self.play:
                        self.play.end_last_turn(row.index, turn)
                    finished[row.index] = row.ids, row.logprobs, not stopped
                    free_slots.append(slot)
                    break
        self.compact(free_slots)
        return finished

    # --- turns

    def hold_waiting(self) -> None:
        """Let the next step compute the last token of the waiting rows again, which changes nothing."""
        for slot, row in enumerate(self.rows):
            if row.waits:
                self.token[slot] = row.ids[-1]
                self.position[slot] = self.row_length(row) - 1

    def continue_rows(self) -> Finished:
        """Append the replies of environments and sample the next token. Returns rows that are over or have no room."""
        replies = self.play.replies(block=all(row.waits for row in self.rows))
        finished = {}
        free_slots = []
        for slot, row in enumerate(self.rows):
            if row.index in replies:
                reply = replies[row.index]
                if reply is None or len(row.ids) + len(reply) >= self.max_completion_length:
                    finished[row.index] = row.ids, row.logprobs, reply is not None
                    free_slots.append(slot)
        self.compact(free_slots)
        slots = [slot for slot, row in enumerate(self.rows) if row.index in replies]
        if slots:
            logits = self.extend(slots, [replies[self.rows[slot].index] for slot in slots])
            finished |= self.collect_finished(slots, *self.draw(slots, logits))
        return finished

    def extend(self, slots: list[int], replies: list[list[int]]) -> torch.Tensor:
        """Append the tokens of replies to rows, whose keys and values are in the cache. Returns logits (rows, V)."""
        rows = [self.rows[slot] for slot in slots]
        new = [[row.ids[-1], *reply] for row, reply in zip(rows, replies)]  # the last token is not in the cache yet
        starts = torch.tensor([self.row_length(row) - 1 for row in rows], device=self.device)  # (B,)
        for row, reply in zip(rows, replies):
            row.append_reply(reply)
        length = max(map(self.row_length, rows))
        self.reserve(length)
        packed = Rows([len(tokens) for tokens in new], self.device, aligned=True)
        positions = starts[packed.row] + packed.column  # (T,)
        query_positions = starts[:, None] + torch.arange(packed.width, device=self.device)
        distance = query_positions[:, :, None] - torch.arange(length, device=self.device)  # (B, W, length)
        masks = masks_by_window(self.decoder, distance >= 0, distance)
        slot = torch.tensor(slots, device=self.device)

        def attend(layer: Layer, query, key, value):
            for cache, x in zip(self.cache[layer.index], (key, value)):
                cache[slot[packed.row], :, positions] = x
            keys, values = self.cache[layer.index][:, slot, :, :length]
            query = packed.pad_heads(query, self.decoder.kv_heads)
            return packed.pack_heads(attention(query, keys, values, masks[layer.window], layer.scaling))

        ids = torch.tensor([token for tokens in new for token in tokens], device=self.device)  # (T,)
        states = self.decoder.forward(ids, positions, attend)
        self.position[slots] = starts + packed.lengths - 1
        if self.seen is not None:
            self.seen[slot[packed.row], ids] = True
        return self.decoder.head(states[packed.lengths.cumsum(0) - 1])[0]

    def row_length(self, row: Row) -> int:
        """Return the tokens of a row, including its prompt."""
        return len(self.prompts[row.index // self.group]) + len(row.ids)

    def compact(self, free_slots: list[int]) -> None:
        """Move the last rows into the free slots, so that the rows occupy the first slots without gaps."""
        num_rows = len(self.rows) - len(free_slots)
        targets = [slot for slot in free_slots if slot < num_rows]
        removed = set(free_slots)
        sources = [slot for slot in range(num_rows, len(self.rows)) if slot not in removed]
        for target, source in zip(targets, sources):
            self.rows[target] = self.rows[source]
        del self.rows[num_rows:]
        if sources:
            used = self.used_length()
            to, origin = (torch.tensor(slots, device=self.device) for slots in (targets, sources))
            for cache in self.cache:
                cache[:, to, :, :used] = cache[:, origin, :, :used]
            for state in self.state:
                state[to] = state[origin]

    def used_length(self) -> int:
        """Return the length of the longest active row."""
        return max(map(self.row_length, self.rows))

    def reserve(self, length: int) -> None:
        """Grow the cache so that it holds rows of this length."""
        current = self.cache[0].shape[3]
        rows = len(self.rows)
        if length > current:
            longer = min(max(length, current + CACHE_GROWTH), self.length)
            for i, cache in enumerate(self.cache):
                self.cache[i] = cache.new_zeros(*cache.shape[:3], longer, cache.shape[4])
                self.cache[i][:, :rows, :, :current] = cache[:, :rows]

    # --- sampling tokens

    def draw(self, slots: Iterable[int], logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Sample the first token of the rows in these slots. Returns tokens and logprobs, each (1, rows)."""
        slots = torch.tensor(list(slots), device=self.device)
        seen = None if self.seen is None else self.seen[slots]
        token, logprob = sample(logits, self.sampling, self.generator, seen)
        self.accept(slots, token)
        return token[None], logprob[None]

    def accept(self, slots: slice | torch.Tensor, token: torch.Tensor) -> None:
        """Record the sampled token of each slot."""
        self.token[slots] = token
        self.position[slots] = (self.position[slots] + 1).clamp(max=self.length - 1)
        if self.seen is not None:
            self.seen[slots] = self.seen[slots].scatter(1, token[:, None], True)

    def step(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Decode one step of all rows, or several on CUDA. Returns tokens and logprobs, each (steps, rows)."""
        rows, length = len(self.rows), self.used_length()
        if not self.use_graphs:
            self.reserve(length)
            token, logprob = self.decode(rows, length)
            return token[None], logprob[None]
        remaining = max(self.max_completion_length - len(row.ids) for row in self.rows)
        steps = min(STEPS_PER_CHECK, remaining)
        replay = self.graph(
            bucket(rows, SMALLEST_BATCH, self.slots), bucket(length + steps, SMALLEST_LENGTH, self.length)
        )
        outputs = [[x[:rows].clone() for x in replay()] for _ in range(steps)]
        return tuple(torch.stack(x) for x in zip(*outputs))

    def decode(self, rows: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Sample the next token of the first `rows` slots, attending to the first `length` positions of the cache.

        Returns tokens and log-probabilities, each (rows,).
        """
        position = self.position[:rows]
        columns = torch.arange(length, device=self.device)
        # The position of an idle slot may exceed `length`. Without a visible key, output and cache would become nan.
        distance = position.clamp(max=length - 1)[:, None, None] - columns  # (rows, 1, length)
        masks = masks_by_window(self.decoder, distance >= 0, distance)
        slots = torch.arange(rows, device=self.device)

        def attend(layer: Layer, query, key, value):
            keys, values = self.cache[layer.index][:, :rows]
            keys[slots, :, position], values[slots, :, position] = key, value
            query = query.view(rows, self.decoder.kv_heads, -1, query.shape[-1])  # (rows, kv heads, g, d)
            mask = masks[layer.window]
            return attention(query, keys[:, :, :length], values[:, :, :length], mask, layer.scaling).reshape(rows, -1)

        states = self.decoder.forward(self.token[:rows], position, attend)
        seen = None if self.seen is None else self.seen[:rows]
        token, logprob = sample(self.decoder.head(states)[0], self.sampling, self.generator, seen)
        self.accept(slice(rows), token)
        return token, logprob

    def graph(self, rows: int, length: int):
        """Return a function that replays `decode(rows, length)` as a CUDA graph, which is captured on first use.

        Results of idle slots are ignored. All graphs share one memory pool.
        """
        if (rows, length) not in self.graphs:
            before = [state.clone() for state in self.state]
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                self.decode(rows, length)  # warm-up: kernels are selected and loaded before the capture
            torch.cuda.current_stream().wait_stream(side)
            for state, values in zip(self.state, before):
                state.copy_(values)
            graph = torch.cuda.CUDAGraph()
            graph.register_generator_state(self.generator)
            pool = next(iter(self.graphs.values()))[0].pool() if self.graphs else None
            with torch.cuda.graph(graph, pool=pool):
                outputs = self.decode(rows, length)
            self.graphs[rows, length] = graph, outputs
        graph, outputs = self.graphs[rows, length]

        def replay():
            graph.replay()
            return outputs

        return replay


def bucket(size: int, smallest: int, largest: int) -> int:
    """Return the first of smallest, 2 x smallest, 4 x smallest, ... that is at least `size`, but at most `largest`."""
    while smallest < min(size, largest):
        smallest *= 2
    return min(smallest, largest)


def uses_graphs(device: torch.device) -> bool:
    return device.type == "cuda"
