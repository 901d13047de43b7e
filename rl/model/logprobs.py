"""Log-probabilities of completion tokens under the current model, in one differentiable pass.

The hidden states that predict the completion tokens are computed by rl/model/decoder.py, each prompt once, or by the
model's own forward if the architecture is not supported there or Unsloth has loaded the model. The head runs on these
states only, in chunks whose logits are recomputed in the backward, so memory does not grow with C x V.
"""

import torch

from rl.model.attention import Rows, SharedPrompts
from rl.model.backends import checkpoint, unsloth_states
from rl.model.policy import Policy

LOGITS_PER_CHUNK = 2**24  # elements of a chunk's logits, 64 MB in fp32; a few tensors of this size exist at a time


def completion_logprobs(
    policy: Policy, prompts: list[list[int]], completions: list[list[int]], with_entropy: bool = False
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Return the log-probabilities of completion tokens at the sampling temperature.

    prompts, completions: token ids. Returns logprobs (B, C) fp32, mask (B, C) bool, and the entropy -sum p log p of
    each next-token distribution (B, C), or None. C is the longest completion; masked positions are 0. The entropy has a
    gradient if `policy.entropy_gradient` is set.
    """
    rows = Rows([len(completion) for completion in completions], policy.device)
    ids = torch.tensor([token for completion in completions for token in completion], device=policy.device)  # (T,)
    transform = policy.logit_transform
    if transform:
        head = policy.head
        states = packed_states(policy, prompts, completions).to(head.weight.dtype)  # (T, H)
    else:
        states = _forward_padded(policy, prompts, completions, False, policy.model)  # logits (T, V)
        head = transform = torch.nn.Identity()

    def chunk_logprobs(states, ids):  # (n, H), (n,) -> (n,), (n,)
        logits = transform(head(states).float()) / policy.temperature  # (n, V)
        log_normalizer = logits.logsumexp(-1)
        logprobs = logits.gather(1, ids[:, None]).squeeze(1) - log_normalizer
        entropy = None
        if with_entropy:
            with torch.set_grad_enabled(policy.entropy_gradient and torch.is_grad_enabled()):
                entropy = log_normalizer - (logits.softmax(-1) * logits).sum(-1)
        return logprobs, entropy

    if type(head) is torch.nn.Linear and not policy.entropy_gradient:
        logprobs, entropy = HeadLogprobs.apply(states, ids, head, transform, policy.temperature)
        return rows.pad(logprobs), rows.mask, rows.pad(entropy) if with_entropy else None
    size = max(1, LOGITS_PER_CHUNK // policy.vocabulary)
    chunks = list(zip(states.split(size), ids.split(size)))
    if torch.is_grad_enabled() and len(chunks) > 1:
        results = [checkpoint(chunk_logprobs, *chunk, use_reentrant=False) for chunk in chunks]
    else:
        results = [chunk_logprobs(*chunk) for chunk in chunks]
    logprobs, entropy = zip(*results)
    return rows.pad(torch.cat(logprobs)), rows.mask, rows.pad(torch.cat(entropy)) if with_entropy else None


class HeadLogprobs(torch.autograd.Function):
    """Log-probabilities and entropies (T,) of tokens (T,) from hidden states (T, H), by a frozen linear head.

    The logits are z = scale x with the head's product x = W h, or z = cap tanh(scale x / cap), whose derivative is
    d = scale (1 - (z / cap)^2). The gradient of a log-probability is W^T (d (onehot(token) - p)) / temperature, with the
    head's weights W (V, H) and the next-token distribution p. It is computed in the forward pass, so that the logits
    exist once and for one chunk only.
    """

    @staticmethod
    def forward(ctx, states, ids, head, transform, temperature):
        size = max(1, LOGITS_PER_CHUNK // head.out_features)
        logprobs = []
        entropies = []
        gradients = []
        for chunk, tokens in zip(states.split(size), ids.split(size)):
            logits = head(chunk).float()  # (n, V)
            slope = None
            if transform.cap:
                logits.mul_(transform.scale / transform.cap).tanh_()
                slope = 1 - logits.square() if ctx.needs_input_grad[0] else None
                logits.mul_(transform.cap / temperature)
            else:
                logits.mul_(transform.scale / temperature)
            logits -= logits.amax(-1, keepdim=True)
            probabilities = logits.softmax(-1)
            log_normalizer = -probabilities.amax(-1).log()  # on a CPU faster than logsumexp
            logprobs.append(logits.gather(1, tokens[:, None]).squeeze(1) - log_normalizer)
            entropies.append(log_normalizer - torch.bmm(probabilities[:, None], logits[:, :, None]).flatten())
            if ctx.needs_input_grad[0]:
                chosen = head.weight[tokens]
                if slope is not None:
                    probabilities *= slope
                    chosen = chosen * slope.gather(1, tokens[:, None]).to(chosen.dtype)
                expected = probabilities.to(states.dtype) @ head.weight
                gradients.append((chosen - expected) * (transform.scale / temperature))
        if gradients:
            ctx.save_for_backward(torch.cat(gradients))
        entropy = torch.cat(entropies)
        ctx.mark_non_differentiable(entropy)
        return torch.cat(logprobs), entropy

    @staticmethod
    def backward(ctx, gradient, _):
        return gradient[:, None].to(ctx.saved_tensors[0].dtype) * ctx.saved_tensors[0], None, None, None, None


def completion_states(
    policy: Policy, prompts: list[list[int]], completions: list[list[int]]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return last hidden states before each completion token and after the last one, (B, C + 1, H), and a mask (B, C).

    States are zero-padded: states[i, t] = hidden[i, P_i - 1 + t], from which token t of row i is predicted. The mask
    marks the completion tokens.
    """
    rows = Rows([len(completion) + 1 for completion in completions], policy.device)
    return rows.pad(packed_states(policy, prompts, completions, after_last=True)), rows.mask[:, 1:]


def packed_states(
    policy: Policy, prompts: list[list[int]], completions: list[list[int]], after_last: bool = False
) -> torch.Tensor:
    """Return the last hidden states from which the completion tokens are predicted, packed, (T, H).

    after_last: include the state after the last token of each row. Otherwise that token is not computed.
    """
    if not policy.shares_prompts:
        return _forward_padded(policy, prompts, completions, after_last)
    inputs = completions if after_last else [completion[:-1] for completion in completions]
    packed = SharedPrompts(policy.decoder, prompts, inputs)
    hidden = policy.decoder.forward(packed.ids, packed.positions, packed.attend)
    return hidden.index_select(0, packed.state_indices())


def _forward_padded(policy: Policy, prompts, completions, after_last: bool, module=None) -> torch.Tensor:
    """Run a module (default: the model without head) on padded rows. Returns packed outputs for completion tokens."""
    sequences = [prompt + completion for prompt, completion in zip(prompts, completions)]
    rows = Rows([len(sequence) for sequence in sequences], policy.device)
    packed = torch.tensor([token for sequence in sequences for token in sequence], device=policy.device)
    ids = torch.where(rows.mask, rows.pad(packed), policy.pad_id)  # (B, W), W the padded width
    if policy.uses_unsloth:
        values = unsloth_states(policy.model, ids, policy.dtype)  # (B, W, H)
    else:
        module = module or policy.model.get_base_model().get_decoder()
        output = module(input_ids=ids, attention_mask=rows.mask.long(), use_cache=False)
        values = output.logits if "logits" in output else output.last_hidden_state
    counts = [len(completion) + after_last for completion in completions]
    indices = [
        i * rows.width + len(prompt) - 1 + t for i, (prompt, n) in enumerate(zip(prompts, counts)) for t in range(n)
    ]
    return values.flatten(0, 1)[torch.tensor(indices, device=policy.device)]
