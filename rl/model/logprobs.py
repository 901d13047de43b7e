"""Log-probabilities of completion tokens under the model as it is, in one differentiable pass.

The hidden states before each completion token are computed by rl/model/decoder.py, each prompt once, or by the model's own
forward where that does not know the architecture or Unsloth has loaded it. The head runs on these alone, in chunks, whose
logits are computed again in the backward: memory does not grow with completion x vocabulary.
"""

import torch

from rl.model.attention import Rows, SharedPrompts
from rl.model.backends import checkpoint, unsloth_states
from rl.model.policy import Policy

LOGITS_PER_CHUNK = 2**24  # elements of a chunk's logits: 64 MB in fp32; a few tensors of this size live at a time


def completion_logprobs(
    policy: Policy, prompts: list[list[int]], completions: list[list[int]], with_entropy: bool = False
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Log-probabilities of completion tokens at the sampling temperature.

    prompts, completions: token ids. Returns logprobs (B, C) fp32, mask (B, C) bool, and the entropy -sum p log p of each
    next-token distribution (B, C), or None. C is the longest completion; masked places are 0. The entropy has a gradient
    where the policy's `entropy_gradient` is set.
    """
    rows = Rows([len(completion) for completion in completions], policy.device)
    ids = torch.tensor([token for completion in completions for token in completion], device=policy.device)  # (N,)
    if policy.plain_head:
        before, head = states_before(policy, prompts, completions), policy.head
    else:
        before = _by_model_forward(policy, prompts, completions, False, policy.model)  # logits (N, V) already
        head = torch.nn.Identity()  # it does more than multiply: a soft cap, a scale

    def of_chunk(states, ids):  # (n, H), (n,) -> (n,), (n,)
        logits = head(states).float() / policy.temperature  # (n, V)
        log_normaliser = logits.logsumexp(-1)
        chosen = logits.gather(1, ids[:, None]).squeeze(1) - log_normaliser
        entropy = None
        if with_entropy:
            with torch.set_grad_enabled(policy.entropy_gradient and torch.is_grad_enabled()):
                entropy = log_normaliser - (logits.softmax(-1) * logits).sum(-1)
        return chosen, entropy

    size = max(1, LOGITS_PER_CHUNK // policy.vocabulary)
    chunks = list(zip(before.split(size), ids.split(size)))
    if torch.is_grad_enabled() and len(chunks) > 1:
        parts = [checkpoint(of_chunk, *chunk, use_reentrant=False) for chunk in chunks]
    else:
        parts = [of_chunk(*chunk) for chunk in chunks]
    chosen, entropy = zip(*parts)
    return rows.pad(torch.cat(chosen)), rows.mask, rows.pad(torch.cat(entropy)) if with_entropy else None


def completion_states(
    policy: Policy, prompts: list[list[int]], completions: list[list[int]]
) -> tuple[torch.Tensor, torch.Tensor]:
    """The last hidden state before each completion token, and after the last one.

    Returns states (B, C + 1, H): place t of row i is hidden[i, P_i - 1 + t], from which token t is predicted; and the mask
    (B, C) of the tokens. Places past the end of a row are 0.
    """
    rows = Rows([len(completion) + 1 for completion in completions], policy.device)
    return rows.pad(states_before(policy, prompts, completions, after_last=True)), rows.mask[:, 1:]


def states_before(
    policy: Policy, prompts: list[list[int]], completions: list[list[int]], after_last: bool = False
) -> torch.Tensor:
    """The last hidden states from which the completions' tokens are predicted, packed, (N, H).

    after_last: of each row also the state after its last token; else that token is not computed at all.
    """
    if not policy.shares_prompts:
        return _by_model_forward(policy, prompts, completions, after_last)
    known = completions if after_last else [completion[:-1] for completion in completions]
    packed = SharedPrompts(policy.decoder, prompts, known)
    hidden = policy.decoder.forward(packed.ids, packed.positions, packed.attend)
    return hidden.index_select(0, packed.before())


def _by_model_forward(policy: Policy, prompts, completions, after_last: bool, module=None) -> torch.Tensor:
    """What the module (None: the model without its head) gives for right-padded rows, before the completions' tokens."""
    texts = [prompt + completion for prompt, completion in zip(prompts, completions)]
    rows = Rows([len(text) for text in texts], policy.device)
    packed = torch.tensor([token for text in texts for token in text], device=policy.device)  # (N,)
    ids = torch.where(rows.mask, rows.pad(packed), policy.pad_id)  # (B, T)
    if policy.uses_unsloth:
        values = unsloth_states(policy.model, ids, policy.dtype)  # (B, T, H)
    else:
        module = module or policy.model.get_base_model().get_decoder()
        output = module(input_ids=ids, attention_mask=rows.mask.long(), use_cache=False)
        values = output.logits if "logits" in output else output.last_hidden_state
    of_row = [len(completion) + after_last for completion in completions]
    taken = [
        i * rows.width + len(prompt) - 1 + t for i, (prompt, n) in enumerate(zip(prompts, of_row)) for t in range(n)
    ]
    return values.flatten(0, 1)[torch.tensor(taken, device=policy.device)]
