"""The settings of a run, with their checks. Names and meanings are those of TRL if TRL has the setting.

rl/run/read_config.py reads them from a YAML file and the command line. Imports neither torch nor transformers.
"""

import math
import typing
from dataclasses import dataclass, field
from typing import Literal

COMMANDS = ("resume", "accept_changes", "dry_run", "gpu_memory", "probe")  # of the command line, not saved with a run

# Bounds of numbers, none of which may be negative. Empty settings are not checked.
AT_LEAST_1 = (
    "max_steps prompts_per_step num_generations max_completion_length rollout_batch_size num_iterations num_mini_batches lora_r "
    "lora_alpha max_tokens_per_micro_batch train_questions eval_questions logging_steps"
).split()
AT_MOST_1 = ("gamma", "lam", "top_p", "warmup_ratio")
BELOW_1 = ("epsilon", "min_p")
ABOVE_0 = {  # each with a hint
    "temperature": "at 0 all completions of a group are the same, with nothing to learn from; evaluation is greedy anyway",
    "top_p": "1 is off",
    "repetition_penalty": "1 is off",
    "code_timeout": "seconds; 1 is usual",
    "max_grad_norm": "a large number is off",
    "epsilon": "0.2 is usual",
    "epsilon_high": "empty is as epsilon",
    "sapo_temperature_pos": "1 is usual",
    "sapo_temperature_neg": "1.05 is usual",
    "cliprange_value": "empty is off",
    "critic_learning_rate": "empty is as learning_rate",
    "target_kl": "empty is off",
    "beta_target_kl": "empty is off",
}


class RunError(Exception):
    """A run cannot continue for a reason outside of its settings. The message is one line that says why."""


class ConfigError(Exception):
    """A setting is wrong. The message is one line that names it and what to change."""


@dataclass
class Config:
    # --- the model
    model: str = "data/tiny"  # a folder, or the id of a model on the Hugging Face Hub
    adapter: str | None = None  # a saved LoRA folder to evaluate or to go on from; empty starts a new one
    load_in_4bit: bool = False  # hold the base model's linear layers as 4-bit NF4 (QLoRA)
    lora_r: int = 16  # rank of the LoRA on every linear layer
    lora_alpha: int = 32  # the LoRA is scaled by lora_alpha / lora_r
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto takes the GPU where there is one
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # auto: fp32 on CPU, else bf16, fp16 on old cards
    gradient_checkpointing: bool = False  # recompute activations in the backward: less memory, more time
    backend: Literal["auto", "unsloth", "transformers"] = "auto"  # auto: Unsloth on a GPU where it is installed

    # --- the questions
    train_data: list[str] = field(default_factory=lambda: ["sums", "words", "functions"])  # built-in families or files
    eval_data: list[str] = field(default_factory=list)  # held-out questions; empty: a held-out part of train_data
    train_questions: int = 3000  # how many to make of each built-in family; at most so many from each file
    eval_questions: int = 402  # how many held-out questions in all
    columns: dict[str, str] = field(default_factory=dict)  # ours to yours: {prompt: question, answer: gold}
    system_prompt: str | None = None  # put before every question as the system message
    chat_template_kwargs: dict[str, typing.Any] = field(default_factory=dict)  # {enable_thinking: false}; YAML only

    # --- rewards
    rewards_file: str = "rewards.py"  # the file with the reward functions
    reward_funcs: list[str] = field(default_factory=list)  # names to use; empty: all in the file
    reward_weights: dict[str, float] = field(default_factory=dict)  # weights by name, in place of the file's
    reward_errors: Literal["stop", "skip"] = "stop"  # a reward function that fails: stop, or leave the completion out
    code_timeout: float = 1.0  # seconds of running time for a model-written program in all its tests; wall: three times
    unsafe_run_model_code: bool = False  # without bubblewrap, run what Monty cannot with the rights of this user
    control: Literal["none", "random-reward"] = "none"  # random-reward: an ablation that trains on coin-flip rewards

    # --- the roll-out
    max_steps: int = 40  # steps: each is one roll-out and the updates made from it
    prompts_per_step: int = 32  # questions asked in a step
    num_generations: int = 8  # completions for each question: the group
    max_completion_length: int = 256  # tokens; a longer completion is cut and counts as truncated
    temperature: float = 1.0  # of the sampling and of every log-probability
    top_p: float = 1.0  # 1 is off; anything else trains a policy other than the one that sampled
    top_k: int = 0  # 0 is off
    min_p: float = 0.0  # 0 is off
    repetition_penalty: float = 1.0  # 1 is off
    rollout_batch_size: int = 512  # rows generated at a time, in training and evaluation; fewer where memory is short

    dynamic_sampling: int = 0  # DAPO: times a step that questions replace groups which are all right or all wrong
    curriculum_steps: int = 0  # over so many first steps questions join by their column `level`, easiest first; 0: off

    # --- the advantage (docs/terms.md explains every algorithm)
    algorithm: Literal["grpo", "rloo", "reinforce", "reinforce_plus_plus", "ppo", "a2c", "dpo"] = "grpo"  # the method
    scale_rewards: Literal["group", "batch", "none"] = "group"  # what grpo divides by: a standard deviation
    baseline: Literal["group", "running", "none"] = "group"  # of reinforce: a mean that is taken off the return
    gamma: float = 1.0  # of ppo and reinforce: what a reward one token later is worth
    lam: float = 1.0  # of ppo: lambda of GAE; 1 is the whole return less the value, 0 the TD error
    whiten_rewards: bool = False  # of ppo: divide the rewards by their standard deviation first
    bootstrap_truncated: bool = False  # of ppo: a truncated completion would have earned its last value; else nothing
    missing_eos_penalty: float = 0.0  # taken off the reward of truncated completions
    soft_punish_cache: int = 0  # DAPO: up to 1 is taken off over so many tokens before max_completion_length; 0: off

    # --- the critic of ppo and a2c
    critic: Literal["adapter", "head"] = "adapter"  # a LoRA of its own | a linear head on the policy's hidden states
    critic_learning_rate: float | None = None  # empty: as learning_rate
    critic_warmup_steps: int = 0  # first steps in which only the critic learns (the schedule of learning_rate runs on)
    cliprange_value: float | None = 0.2  # how far an update may move a value before its loss is clipped; empty: any

    # --- the update
    loss_type: Literal["dapo", "grpo", "dr_grpo", "cispo", "sapo"] = "dapo"  # of a token, and how the mean is taken
    importance_sampling_level: Literal["token", "sequence"] = "token"  # of the probability ratio; sequence: GSPO
    sapo_temperature_pos: float = 1.0  # of SAPO's soft clip where the advantage is positive
    sapo_temperature_neg: float = 1.05  # the same where it is negative
    num_iterations: int = 1  # epochs over one roll-out
    num_mini_batches: int = 1  # optimizer steps in an epoch
    epsilon: float = 0.2  # PPO's clip range of the probability ratio, downwards
    epsilon_high: float | None = None  # the same upwards; empty: as epsilon (DAPO: 0.28)
    delta: float | None = None  # upper bound on the ratio where the advantage is negative; empty: none
    target_kl: float | None = None  # the epochs over a roll-out end when the policy has moved so far, nats a token
    entropy_coef: float = 0.0  # weight of an entropy bonus in the loss
    beta: float = 0.0  # weight of the KL from the reference (the model without its LoRA); in dpo the scale of margins
    beta_target_kl: float | None = None  # of ppo: the KL, nats a completion, that beta follows; empty: beta is fixed
    importance_sampling_cap: float = 2.0  # in bf16 and fp16: bound on pi / sampler, whose kernels differ; 0: off
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"  # of the KL in the loss; in the reward (ppo) it is k1
    use_bias_correction_kl: bool = True  # multiply the estimate by the probability ratio: an unbiased gradient
    mask_truncated_completions: bool = False  # leave truncated completions out of the loss
    learning_rate: float = 1e-5  # LoRA wants about ten times that of full fine-tuning
    lr_scheduler_type: Literal["constant", "linear", "cosine"] = "constant"  # what the learning rate does over the run
    warmup_ratio: float = 0.0  # share of the steps in which the learning rate rises from 0
    optim: Literal["adamw_torch", "adamw_8bit", "paged_adamw_8bit"] = "adamw_torch"  # 8-bit: less memory, CUDA only
    weight_decay: float = 0.0  # of AdamW
    max_grad_norm: float = 1.0  # gradients are scaled down to this norm
    max_tokens_per_micro_batch: int = 8192  # prompt, completion and padding tokens in one forward and backward pass

    # --- the run
    output_dir: str | None = None  # the run folder; empty: runs/NAME-TIME
    seed: int = 0  # of the questions, the LoRA and the sampling
    eval_steps: int = 10  # evaluate every so many steps; 0: only before and after
    early_stopping: int = 0  # stop after so many evaluations in a row without a new best; 0: never
    save_steps: int = 20  # save a checkpoint every so many steps; 0: only the best, and at the end
    save_total_limit: int = 3  # so many newest checkpoints are kept, and the best; 0: all
    logging_steps: int = 1  # a console line every so many steps
    log_completions_steps: int = 10  # print the two completions with the highest reward every so many steps; 0: never
    report_to: list[Literal["tensorboard", "trackio", "wandb"]] = field(default_factory=list)  # trackers of the metrics
    eval_only: bool = False  # evaluate the model (and adapter) on the held-out questions, then stop

    # --- what to do, on the command line alone
    resume: str | None = None  # go on with a run, runs/NAME, or from one of its checkpoints
    accept_changes: bool = False  # with --resume: go on although settings, rewards or questions are not those of before
    dry_run: bool = False  # predict the memory by arithmetic, without loading the model, then stop
    gpu_memory: float | None = None  # with --dry-run: of the card, GB; empty: what this machine has
    probe: bool = False  # load everything, try the longest batches, run two steps, say time and memory, then stop

    def check(self) -> None:
        """Raise ConfigError for values that cannot work."""
        for name, value in vars(self).items():
            if not isinstance(value, (int, float)) or name in ("seed", "gpu_memory"):
                continue
            if not math.isfinite(value):
                raise ConfigError(f"{name} is {value}, but must be a finite number")
            if name in AT_LEAST_1 and value < 1:
                raise ConfigError(f"{name} is {value}, but must be at least 1")
            if name in ABOVE_0 and value <= 0:
                raise ConfigError(f"{name} is {value:g}, but must be above 0 ({ABOVE_0[name]})")
            if value < 0:
                raise ConfigError(f"{name} is {value}, but must not be negative")
            if name in AT_MOST_1 and value > 1:
                raise ConfigError(f"{name} is {value}, but must be at most 1")
            if name in BELOW_1 and value >= 1:
                raise ConfigError(f"{name} is {value}, but must be below 1")
        self._check_algorithm()
        if self.delta is not None and self.delta <= 1 + (self.epsilon_high or self.epsilon):
            raise ConfigError(
                f"delta is {self.delta}, but bounds the ratio from above: it must exceed 1 + epsilon_high = "
                f"{1 + (self.epsilon_high or self.epsilon):g}"
            )
        if self.kl_in_loss and self.kl_estimator == "k1" and not self.use_bias_correction_kl:
            raise ConfigError(
                "kl_estimator k1 in the loss has a gradient of zero on average: set use_bias_correction_kl to true, or "
                "kl_estimator to k2 or k3"
            )
        if self.num_mini_batches > self.prompts_per_step:
            raise ConfigError(
                f"num_mini_batches ({self.num_mini_batches}) is more than prompts_per_step ({self.prompts_per_step}): "
                "each mini-batch needs at least one group"
            )
        if self.rollout_batch_size < self.num_generations:
            raise ConfigError(
                f"rollout_batch_size ({self.rollout_batch_size}) is less than num_generations ({self.num_generations}): a "
                "group is generated together"
            )
        if self.gpu_memory is not None and not (self.dry_run and 0 < self.gpu_memory < math.inf):
            raise ConfigError(f"gpu_memory is {self.gpu_memory:g}, but is the GB of a card for --dry-run, above 0")
        if not self.train_data:
            raise ConfigError("train_data is empty: name built-in families (sums, words, functions) or files")

    def _check_algorithm(self) -> None:
        """Check what algorithms and losses require of other settings."""
        if self.num_generations == 1 and (self.uses_group or self.dynamic_sampling):
            raise ConfigError(
                f"num_generations is 1, but {'dynamic_sampling' if self.dynamic_sampling else self.algorithm} compares the "
                "completions of a group: set at least 2 (8 is usual)"
            )
        if self.algorithm in ("reinforce", "a2c") and not self.on_policy:
            raise ConfigError(
                f"algorithm {self.algorithm} learns once from each roll-out: set num_iterations and num_mini_batches to 1, "
                f"or algorithm to {'ppo' if self.has_critic else 'rloo or grpo'}"
            )
        if self.dynamic_sampling and self.control != "none":
            raise ConfigError(
                "dynamic_sampling chooses groups by what is right, which the control must not know: set it to 0"
            )
        if self.has_critic and self.critic_warmup_steps >= self.max_steps:
            raise ConfigError(
                f"critic_warmup_steps ({self.critic_warmup_steps}) must be less than max_steps ({self.max_steps}), or the "
                "policy never learns"
            )
        for name in ("target_kl", "entropy_coef"):
            if self.algorithm == "dpo" and getattr(self, name):
                raise ConfigError(f"{name} has no part in dpo: leave it out")
        if self.target_kl and self.on_policy:
            raise ConfigError(
                "target_kl ends the epochs early, but there is one update for each roll-out: leave it out, or raise "
                "num_iterations or num_mini_batches"
            )
        if self.algorithm == "dpo" and not self.beta:
            raise ConfigError("beta is 0, but dpo needs it: how far a preference may move the policy (0.1 is usual)")
        if self.beta_target_kl and not (self.has_critic and self.beta):
            raise ConfigError(
                "beta_target_kl adapts the beta of ppo: set algorithm to ppo and beta above 0 to begin with"
            )
        if self.loss_type == "cispo" and (self.epsilon_high is None or self.epsilon_high < 1):
            raise ConfigError(
                f"epsilon_high is {self.epsilon_high}, but with loss_type cispo it is the ceiling of the ratio itself: set it "
                "to 1 or more (5 is usual)"
            )
        if self.importance_sampling_level == "sequence" and self.loss_type not in ("grpo", "dapo", "dr_grpo"):
            raise ConfigError(
                f"importance_sampling_level sequence does not go with loss_type {self.loss_type}: use grpo"
            )
        if self.soft_punish_cache >= self.max_completion_length:
            raise ConfigError(
                f"soft_punish_cache ({self.soft_punish_cache}) must be less than max_completion_length "
                f"({self.max_completion_length}): it is its last part"
            )

    @property
    def has_critic(self) -> bool:
        return self.algorithm in ("ppo", "a2c")

    @property
    def uses_group(self) -> bool:
        """Advantages compare a completion with its group."""
        return not self.has_critic and not (self.algorithm == "reinforce" and self.baseline != "group")

    @property
    def kl_in_loss(self) -> bool:
        """The KL divergence is a term of the loss. With a critic it is part of the reward, in dpo of the margin."""
        return self.beta > 0 and not self.has_critic and self.algorithm != "dpo"

    @property
    def on_policy(self) -> bool:
        """There is one update for each roll-out, so that the old policy is the policy and needs no forward pass."""
        return self.num_iterations == 1 and self.num_mini_batches == 1

    def evaluates_at(self, step: int) -> bool:
        """Whether the policy is evaluated after a step. Step 0 is the baseline; the final evaluation is separate."""
        return step == 0 or (self.eval_steps > 0 and step % self.eval_steps == 0 and step < self.max_steps)

    def notes(self) -> list[str]:
        """Notes on settings that are valid together, but perhaps unintended."""
        usual = {"top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0}
        changed = [f"{name} {getattr(self, name)}" for name, value in usual.items() if getattr(self, name) != value]
        notes = []
        if changed:
            notes.append(f"{', '.join(changed)}: the policy that samples is not quite the one that is trained")
        if self.importance_sampling_level == "sequence" and (self.loss_type != "grpo" or self.epsilon > 0.01):
            notes.append(
                "GSPO is meant for loss_type grpo, epsilon 3e-4 and epsilon_high 4e-4: a sequence's ratio stays near 1"
            )
        if self.has_critic and self.adapter:
            notes.append("the critic starts untrained: critic_warmup_steps trains it before the policy")
        return notes
