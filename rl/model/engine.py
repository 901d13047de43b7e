"""The roll-out engine for the families of rl/model/decoder.py: a decode step over slots that rows enter and leave.

A prompt is prefilled once for its group, and its keys and values are copied into the slots of the group's completions.
The rows that are alive always fill the first slots: a row that ends gives its place to the last one, and groups that
wait enter behind. So a step costs what its living rows cost. Where memory allows, the LoRA is folded into scratch
weights for the time of the roll-out. On CUDA a step, sampling included, is one CUDA graph for each size of the batch.
"""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

import psutil
import torch

from rl.config import ConfigError
from rl.model.attention import Rows, attention, causal, masks_by_window, round_up
from rl.model.decoder import Layer
from rl.model.policy import Policy
from rl.model.sampling import Ended, Sampling, sample

REFILL_SHARE = 1 / 8  # groups that wait enter together, once this share of the slots is free
PREFILL_TOKENS = 16384  # prompt tokens prefilled at a time
STEPS_PER_CHECK = 8  # on CUDA: decode steps between two looks at what has ended, since each look waits for the GPU
CACHE_GROWTH = 64  # places by which the cache grows at the least
MAX_MEMORY_SHARE = 0.8  # of the free memory, at most
SMALLEST_BATCH, SMALLEST_LENGTH = 8, 256  # of the CUDA graphs; sizes double from there


@dataclass
class Row:
    """A completion that is being generated."""

    place: int  # in the roll-out's result
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)


class Engine:
    """Slots for the rows of one roll-out. To be used once: `run`, or `steps`."""

    def __init__(
        self,
        policy: Policy,
        prompts: list[list[int]],
        num_generations: int,
        max_completion_length: int,
        sampling: Sampling,
        generator: torch.Generator,
        max_rows: int,
    ):
        self.device, self.eos_ids = policy.device, policy.eos_ids
        self.prompts, self.group, self.max_completion_length = prompts, num_generations, max_completion_length
        self.sampling, self.generator = sampling, generator
        self.rows: list[Row] = []  # rows[i] lives in slot i
        self.slots = max(min(max_rows, len(prompts) * num_generations), num_generations)
        self.length = round_up(max(map(len, prompts)) + max_completion_length, self.device)  # of the longest row
        self.use_graphs = uses_graphs(self.device)
        self.decoder = policy.decoder
        while self.slots > self.group and not fits(self.cache_bytes(), self.device):
            self.slots = max(self.slots // 2, self.group)  # the others wait for their turn
        if self.decoder.can_fold() and fits(self.decoder.scratch_bytes() + self.cache_bytes(), policy.device):
            self.decoder = self.decoder.folded()
        self.decoder.prepare(self.length)

        decoder = self.decoder
        # Keys and values of each layer: (2, slots, kv heads, length, d). One tensor a layer, since the allocator of a CPU
        # gives larger ones back to the system at once, and getting them again costs more than what they are used for.
        shape = 2, self.slots, decoder.kv_heads, 0, decoder.head_dim
        self.cache = [torch.zeros(shape, device=self.device, dtype=decoder.dtype) for _ in decoder.layers]
        if self.use_graphs:
            self.reserve(self.length)  # CUDA graphs need it to stay where it is; else it grows
        self.token = torch.zeros(self.slots, dtype=torch.long, device=self.device)  # the last one of each row
        self.position = torch.zeros_like(self.token)  # of that token in its row
        self.seen = None
        if sampling.repetition_penalty != 1:
            vocabulary = decoder.embedding.num_embeddings
            self.seen = torch.zeros(self.slots, vocabulary, dtype=torch.bool, device=self.device)
        self.state = [
            state for state in (self.token, self.position, self.seen) if state is not None
        ]  # changed in place
        self.graphs = {}

    def cache_bytes(self) -> int:
        """What keys and values take when every slot holds a row of the full length."""
        decoder = self.decoder
        per_token = 2 * len(decoder.layers) * decoder.kv_heads * decoder.head_dim * decoder.dtype.itemsize
        return self.slots * self.length * per_token

    def run(self) -> Iterator[Ended]:
        """Yield the completions that have just ended, by their place: prompt i's are i * num_generations and on."""
        for ended in self.steps():
            if ended:
                yield ended

    def steps(self) -> Iterator[Ended]:
        """The same after every decode step, also where nothing has ended: `rows` holds what the others have so far."""
        waiting = deque(enumerate(self.prompts))
        while waiting or self.rows:
            free = self.slots - len(self.rows)
            if waiting and (not self.rows or free >= max(self.group, REFILL_SHARE * self.slots)):
                entering = [waiting.popleft() for _ in range(min(len(waiting), free // self.group))]
                first = len(self.rows)
                tokens, logprobs = self.draw(first, self.admit(entering))
            else:
                first = 0
                tokens, logprobs = self.step()
            yield self.collect_finished(first, tokens, logprobs)

    def allocate_peak(self) -> None:
        """Fill the slots with these prompts' groups, and make one step at the full length: as much memory as a run takes."""
        groups = list(enumerate(self.prompts))[: self.slots // self.group]
        self.draw(0, self.admit(groups))
        for row in self.rows:
            row.ids = [0] * (self.max_completion_length - 1)
        self.reserve(self.used_length())
        self.step()

    # --- rows come and go

    def admit(self, groups: list[tuple[int, list[int]]]) -> torch.Tensor:
        """Prefill these prompts, once each, and put their groups into the slots behind those that are taken.

        Returns the logits from which the new rows' first tokens are drawn, (rows, V).
        """
        budget = max(1, PREFILL_TOKENS // max(len(prompt) for _, prompt in groups))
        logits = []
        for start in range(0, len(groups), budget):
            part = groups[start : start + budget]
            into = slice(len(self.rows), len(self.rows) + len(part) * self.group)
            logits.append(self.prefill([prompt for _, prompt in part], into))
            for number, _ in part:
                self.rows += [Row(number * self.group + i) for i in range(self.group)]
        return torch.cat(logits).repeat_interleave(self.group, 0)

    def prefill(self, prompts: list[list[int]], into: slice) -> torch.Tensor:
        """Run these prompts and copy their keys and values, group by group, into the slots. Returns their logits (P, V)."""
        rows, group = Rows([len(prompt) for prompt in prompts], self.device, aligned=True), self.group
        masks = masks_by_window(self.decoder, *causal(rows.width, self.device))
        self.reserve(min(rows.width + CACHE_GROWTH, self.length))

        def attend(layer: Layer, query, key, value):
            query, keys, values = (rows.pad_heads(x, self.decoder.kv_heads) for x in (query, key, value))
            for kind, x in enumerate((keys, values)):
                self.cache[layer.index][kind, into, :, : rows.width] = x.repeat_interleave(group, 0)
            return rows.pack_heads(attention(query, keys, values, masks[layer.window], layer.scaling))

        ids = torch.tensor([token for prompt in prompts for token in prompt], device=self.device)  # (N,)
        states = self.decoder.forward(ids, rows.column, attend)
        self.position[into] = (rows.lengths - 1).repeat_interleave(group)
        if self.seen is not None:
            of_prompts = torch.zeros(len(prompts), self.seen.shape[1], dtype=torch.bool, device=self.device)
            of_prompts[rows.row, ids] = True
            self.seen[into] = of_prompts.repeat_interleave(group, 0)
        return self.decoder.head(states[rows.lengths.cumsum(0) - 1])[0]

    def collect_finished(self, first: int, tokens: torch.Tensor, logprobs: torch.Tensor) -> Ended:
        """Give the rows from slot `first` on what was drawn for them, (steps, rows), and take out those that have ended.

        A row that ended gets nothing more; a row behind it takes its slot.
        """
        ended, holes = {}, []
        for slot, (ids, values) in enumerate(zip(tokens.T.tolist(), logprobs.T.tolist()), first):
            row = self.rows[slot]
            for token, logprob in zip(ids, values):
                if logprob != logprob:
                    raise ConfigError(
                        f"dtype: in {self.decoder.dtype} the model's logits are not numbers; set dtype to float32 or bfloat16"
                    )
                row.ids.append(token)
                row.logprobs.append(logprob)
                stopped = token in self.eos_ids
                if stopped or len(row.ids) == self.max_completion_length:
                    ended[row.place] = row.ids, row.logprobs, not stopped
                    holes.append(slot)
                    break
        self.compact(holes)
        return ended

    def compact(self, holes: list[int]) -> None:
        """Move the last rows into the slots that have become free, so that the first slots are the taken ones."""
        kept = len(self.rows) - len(holes)
        free = [hole for hole in holes if hole < kept]
        gone = set(holes)
        moved = [slot for slot in range(kept, len(self.rows)) if slot not in gone]
        for hole, slot in zip(free, moved):
            self.rows[hole] = self.rows[slot]
        del self.rows[kept:]
        if moved:
            used = self.used_length()
            to, origin = (torch.tensor(slots, device=self.device) for slots in (free, moved))
            for cache in self.cache:
                cache[:, to, :, :used] = cache[:, origin, :, :used]
            for state in self.state:
                state[to] = state[origin]

    def used_length(self) -> int:
        """The length of the longest row that is alive."""
        return max(len(self.prompts[row.place // self.group]) + len(row.ids) for row in self.rows)

    def reserve(self, length: int) -> None:
        """Make the cache long enough for rows of this length."""
        present, rows = self.cache[0].shape[3], len(self.rows)
        if length > present:
            longer = min(max(length, present + CACHE_GROWTH), self.length)
            for i, cache in enumerate(self.cache):
                self.cache[i] = cache.new_zeros(*cache.shape[:3], longer, cache.shape[4])
                self.cache[i][:, :rows, :, :present] = cache[:, :rows]

    # --- tokens are drawn

    def draw(self, first: int, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Draw the first tokens of the rows from slot `first` on: tokens and log-probabilities, each (1, rows)."""
        slots = slice(first, first + len(logits))
        seen = None if self.seen is None else self.seen[slots]
        token, logprob = sample(logits, self.sampling, self.generator, seen)
        self.accept(slots, token)
        return token[None], logprob[None]

    def accept(self, slots: slice, token: torch.Tensor) -> None:
        self.token[slots] = token
        self.position[slots] = (self.position[slots] + 1).clamp(max=self.length - 1)
        if self.seen is not None:
            self.seen[slots] = self.seen[slots].scatter(1, token[:, None], True)

    def step(self) -> tuple[torch.Tensor, torch.Tensor]:
        """One decode step of all rows, or on CUDA a few: tokens and log-probabilities, each (steps, rows)."""
        rows, length = len(self.rows), self.used_length()
        if not self.use_graphs:
            self.reserve(length)
            token, logprob = self.decode(rows, length)
            return token[None], logprob[None]
        left = max(self.max_completion_length - len(row.ids) for row in self.rows)
        steps = min(STEPS_PER_CHECK, left)
        replay = self.graph(
            bucket(rows, SMALLEST_BATCH, self.slots), bucket(length + steps, SMALLEST_LENGTH, self.length)
        )
        drawn = [[x[:rows].clone() for x in replay()] for _ in range(steps)]
        return tuple(torch.stack(x) for x in zip(*drawn))

    def decode(self, rows: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Run the last token of the first `rows` slots over the first `length` places of the cache, and draw the next."""
        position = self.position[:rows]
        columns = torch.arange(length, device=self.device)
        # An idle slot of a graph may stand beyond `length`; if it saw nothing, its nan would stay in its cache.
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
        """A function that replays `decode(rows, length)` as a CUDA graph and returns its outputs; captured when first used.

        The slots between the living rows and `rows` decode what nobody reads. All graphs share one pool of memory.
        """
        if (rows, length) not in self.graphs:
            before = [state.clone() for state in self.state]
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                self.decode(rows, length)  # kernels are chosen and loaded before the capture
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
    """The size doubled up from the smallest that holds `size`, at most the largest."""
    while smallest < min(size, largest):
        smallest *= 2
    return min(smallest, largest)


def uses_graphs(device: torch.device) -> bool:
    return device.type == "cuda"


def fits(needed: int, device: torch.device) -> bool:
    """Whether so many bytes leave at least a fifth of the free memory unused."""
    return needed < MAX_MEMORY_SHARE * free_memory(device)


def free_memory(device: torch.device) -> float:
    """Bytes. What PyTorch's allocator holds on a GPU and does not use is free, too."""
    if device.type != "cuda":
        return psutil.virtual_memory().available
    free, total = torch.cuda.mem_get_info(device)
    reserved, allocated = torch.cuda.memory_reserved(device), torch.cuda.memory_allocated(device)
    allowed = torch.cuda.get_per_process_memory_fraction(device) * total - allocated
    return min(free + reserved - allocated, allowed)
