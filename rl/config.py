"""Settings of a run and their checks. Settings that TRL also has keep TRL's name and meaning.

rl/run/read_config.py reads them from a YAML file and the command line. Imports neither torch nor transformers.
"""

import math
import typing
from dataclasses import dataclass, field, fields
from typing import Literal

COMMANDS = ("resume", "accept_changes", "dry_run", "gpu_memory", "probe")  # command line only; not saved with a run

# Bounds. No number may be negative. Empty settings are not checked.
AT_LEAST_1 = (
    "max_steps prompts_per_step num_generations max_completion_length rollout_batch_size num_iterations num_mini_batches lora_r "
    "lora_alpha max_turns max_turn_length max_tokens_per_micro_batch sft_epochs train_questions eval_questions logging_steps"
).split()
AT_MOST_1 = ("gamma", "lam", "top_p", "warmup_ratio")
BELOW_1 = ("epsilon", "min_p")
ABOVE_0 = {  # setting: hint for the error message
    "temperature": "at 0 all completions of a group are equal and give no signal; evaluation is greedy anyway",
    "top_p": "1 turns it off",
    "repetition_penalty": "1 turns it off",
    "code_timeout": "seconds; 1 is usual",
    "environment_timeout": "seconds; 10 is usual",
    "max_grad_norm": "a large number turns clipping off",
    "epsilon": "0.2 is usual",
    "epsilon_high": "leave it empty to use epsilon",
    "sapo_temperature_pos": "1 is usual",
    "sapo_temperature_neg": "1.05 is usual",
    "cliprange_value": "leave it empty to turn it off",
    "sft_learning_rate": "leave sft_data empty to turn the cold start off",
    "critic_learning_rate": "leave it empty to use learning_rate",
    "target_kl": "leave it empty to turn it off",
    "beta_target_kl": "leave it empty to turn it off",
}


class RunError(Exception):
    """A run cannot continue, for a reason other than its settings. The message is one line with the reason."""


class ConfigError(Exception):
    """A setting is wrong. The message is one line with the setting and what to change."""


@dataclass
class Config:
    # --- model
    model: str = "data/tiny"  # a folder, a GGUF file, or a model id on the Hugging Face Hub
    adapter: str | None = None  # LoRA folder to evaluate or to start from; empty: a new LoRA
    load_in_4bit: bool = False  # load the base model in 4-bit NF4 (QLoRA)
    lora_r: int = 16  # rank of the LoRA, which is added to every linear layer
    lora_alpha: int = 32  # LoRA scaling: the update is multiplied by lora_alpha / lora_r
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: the GPU if there is one
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # auto: bf16 if it is fast, else fp16 or fp32
    gradient_checkpointing: bool = False  # recompute activations in the backward pass: less memory, more time
    backend: Literal["auto", "unsloth", "transformers"] = "auto"  # auto: Unsloth on a GPU if it is installed

    # --- questions
    train_data: list[str] = field(default_factory=lambda: ["sums", "words", "functions"])  # families, files or Hub ids
    eval_data: list[str] = field(default_factory=list)  # held-out questions; empty: split off from train_data
    train_questions: int = 3000  # maximum number of questions from each source of train_data
    eval_questions: int = 402  # number of held-out questions in total
    columns: dict[str, str] = field(default_factory=dict)  # column names, ours to yours: {answer: gold}
    system_prompt: str | None = None  # system message before every question
    chat_template_kwargs: dict[str, typing.Any] = field(default_factory=dict)  # chat-template arguments (YAML only)

    # --- environments (docs/environments.md)
    environment: str | None = None  # class of rows that have none, such as environments.py:Calculator
    play: Literal["auto", "tools", "text"] = "auto"  # form of commands: tool calls, or a line of text
    max_turns: int = 16  # turns of an episode
    max_turn_length: int | None = None  # tokens of a turn at which the episode ends; empty: no limit of its own
    environment_timeout: float = 10.0  # seconds for a call in an environment

    # --- cold start
    sft_data: str | None = None  # file of demonstrations for supervised training before the first step; empty: none
    sft_epochs: int = 3  # epochs over the demonstrations
    sft_learning_rate: float = 5e-4  # peak learning rate of the cold start

    # --- rewards
    rewards_file: str = "rewards.py"  # Python file with the reward functions
    reward_funcs: list[str] = field(default_factory=list)  # reward functions to use, by name; empty: all in the file
    reward_weights: dict[str, float] = field(default_factory=dict)  # weights by function name; they replace the file's
    reward_errors: Literal["stop", "skip"] = "stop"  # if a reward function raises: stop the run, or skip the completion
    code_timeout: float = 1.0  # CPU seconds for all tests of a program; its wall-clock limit is three times that
    unsafe_run_model_code: bool = False  # without bubblewrap, run programs that need more than Monty unprotected
    control: Literal["none", "random-reward"] = "none"  # random-reward: ablation that trains on coin-flip rewards

    # --- roll-out
    max_steps: int = 40  # training steps; each is one roll-out and its updates
    prompts_per_step: int = 32  # prompts in each step
    num_generations: int = 8  # completions of each prompt (the group)
    max_completion_length: int = 256  # token limit of a completion, of a whole episode with environments
    temperature: float = 1.0  # sampling temperature, also used for log-probabilities
    top_p: float = 1.0  # nucleus sampling; 1: off. Values below 1 make the update off-policy
    top_k: int = 0  # sample from the k most likely tokens; 0: off
    min_p: float = 0.0  # drop tokens below min_p times the highest probability; 0: off
    repetition_penalty: float = 1.0  # penalty on tokens that occurred before; 1: off
    rollout_batch_size: int = 512  # completions generated at a time; lowered automatically if memory is short
    rollout: Literal["local", "vllm"] = "local"  # vllm: completions come from a server (docs/scaling.md)
    rollout_url: str = "http://127.0.0.1:8000"  # address of the vLLM server

    dynamic_sampling: int = 0  # DAPO: rounds per step that replace all-right and all-wrong groups; 0: off
    curriculum_steps: int = 0  # steps over which harder questions join (column level); 0: off

    # --- advantages (docs/algorithms.md explains every algorithm)
    algorithm: Literal["grpo", "rloo", "reinforce", "reinforce_plus_plus", "ppo", "a2c", "dpo"] = "grpo"  # RL algorithm
    scale_rewards: Literal["group", "batch", "none"] = "group"  # grpo: standard deviation that divides the advantages
    baseline: Literal["group", "running", "none"] = "group"  # reinforce: subtracted from the return
    gamma: float = 1.0  # ppo, reinforce: discount factor
    lam: float = 1.0  # ppo: lambda of GAE; 1: return minus value, 0: TD error
    whiten_rewards: bool = False  # ppo: scale the rewards to standard deviation 1, keeping their mean
    bootstrap_truncated: bool = False  # ppo: value after a truncated completion: the critic's estimate, not 0
    missing_eos_penalty: float = 0.0  # subtracted from the reward of truncated completions
    soft_punish_cache: int = 0  # DAPO: tokens before max_completion_length over which a penalty rises to 1; 0: off

    # --- critic (ppo, a2c)
    critic: Literal["adapter", "head"] = "adapter"  # a LoRA with a value head, or only a value head on the policy
    critic_learning_rate: float | None = None  # learning rate of the critic; empty: learning_rate
    critic_warmup_steps: int = 0  # number of first steps that train only the critic (part of the LR schedule)
    cliprange_value: float | None = 0.2  # clip range of the value loss; empty: off

    # --- update
    loss_type: Literal["dapo", "grpo", "dr_grpo", "cispo", "sapo"] = "dapo"  # token loss and its normalisation
    importance_sampling_level: Literal["token", "sequence"] = "token"  # level of the importance ratio; sequence: GSPO
    sapo_temperature_pos: float = 1.0  # SAPO: temperature for positive advantages
    sapo_temperature_neg: float = 1.05  # SAPO: temperature for negative advantages
    num_iterations: int = 1  # epochs over each roll-out
    num_mini_batches: int = 1  # optimizer steps per epoch
    epsilon: float = 0.2  # lower clip range of the importance ratio
    epsilon_high: float | None = None  # upper clip range; empty: epsilon (DAPO: 0.28)
    delta: float | None = None  # upper bound of the ratio for negative advantages (two-sided clipping); empty: off
    target_kl: float | None = None  # end a step's epochs once KL(old || new) exceeds this, nats per token; empty: off
    entropy_coef: float = 0.0  # weight of the entropy bonus
    beta: float = 0.0  # weight of the KL to the reference (the model at the start); dpo: scale of the margin
    beta_target_kl: float | None = None  # ppo: adapt beta towards this KL, in nats per completion; empty: off
    importance_sampling_cap: float = 2.0  # bf16, fp16: upper bound of pi_old / pi_sampler in the loss; 0: off
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"  # estimator of the KL in the loss; in the reward (ppo) it is k1
    use_bias_correction_kl: bool = True  # multiply the KL estimate by the importance ratio (unbiased gradient)
    mask_truncated_completions: bool = False  # exclude truncated completions from the loss
    learning_rate: float = 1e-5  # peak learning rate; LoRA needs about 10 times that of full fine-tuning
    lr_scheduler_type: Literal["constant", "linear", "cosine"] = "constant"  # learning-rate schedule
    warmup_ratio: float = 0.0  # fraction of the steps in which the learning rate rises from 0
    optim: Literal["adamw_torch", "adamw_8bit", "paged_adamw_8bit"] = "adamw_torch"  # 8-bit: less memory, CUDA only
    weight_decay: float = 0.0  # AdamW weight decay
    max_grad_norm: float = 1.0  # maximum gradient norm, for clipping
    max_tokens_per_micro_batch: int = 8192  # tokens in one forward and backward pass, padding included

    # --- run
    output_dir: str | None = None  # run folder; empty: runs/NAME-TIME
    seed: int = 0  # random seed of the questions, the LoRA and the sampling
    eval_steps: int = 10  # steps between evaluations; 0: only before and after training
    early_stopping: int = 0  # stop after this many evaluations in a row without a new best; 0: off
    save_steps: int = 20  # steps between checkpoints; 0: only the best and the last
    save_total_limit: int = 3  # number of newest checkpoints to keep, in addition to the best; 0: all
    logging_steps: int = 1  # steps between console lines
    log_completions_steps: int = 10  # steps between printouts of the two completions with the highest reward; 0: off
    report_to: list[Literal["tensorboard", "trackio", "wandb"]] = field(default_factory=list)  # experiment trackers
    eval_only: bool = False  # evaluate the model (and adapter) on the held-out questions, then exit

    # --- commands, only on the command line
    resume: str | None = None  # resume a run, runs/NAME, or one of its checkpoints
    accept_changes: bool = False  # with --resume: resume even if settings, rewards or questions have changed
    dry_run: bool = False  # predict the memory without loading the model, then exit
    gpu_memory: float | None = None  # with --dry-run: memory of the card in GB; empty: this machine's
    probe: bool = False  # load everything, run the largest batches and two steps, report time and memory, then exit

    def __post_init__(self):
        for setting in fields(self):  # empty text on the command line turns a recipe's setting off
            if setting.default is None and getattr(self, setting.name) == "":
                setattr(self, setting.name, None)

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
                f"delta is {self.delta}, but must exceed 1 + epsilon_high = {1 + (self.epsilon_high or self.epsilon):g}: "
                "it is the upper bound of the ratio"
            )
        if self.kl_in_loss and self.kl_estimator == "k1" and not self.use_bias_correction_kl:
            raise ConfigError(
                "kl_estimator k1 in the loss has an expected gradient of zero: set use_bias_correction_kl to true, or "
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
            raise ConfigError(
                f"gpu_memory is {self.gpu_memory:g}, but it needs --dry-run and a value above 0 (GB of a card)"
            )
        if not self.train_data:
            raise ConfigError("train_data is empty: name built-in families (sums, words, functions) or files")

    def _check_algorithm(self) -> None:
        """Raise ConfigError for combinations that the algorithm or the loss does not support."""
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
                "dynamic_sampling selects groups by correctness, which the control run must not use: set dynamic_sampling to 0"
            )
        if self.has_critic and self.critic_warmup_steps >= self.max_steps:
            raise ConfigError(
                f"critic_warmup_steps ({self.critic_warmup_steps}) must be less than max_steps ({self.max_steps}): "
                "otherwise the policy is never trained"
            )
        for name in ("target_kl", "entropy_coef"):
            if self.algorithm == "dpo" and getattr(self, name):
                raise ConfigError(f"{name} has no effect with algorithm dpo: leave it out")
        if self.target_kl and self.on_policy:
            raise ConfigError(
                "target_kl ends the epochs early, but there is one update for each roll-out: leave it out, or raise "
                "num_iterations or num_mini_batches"
            )
        if self.algorithm == "dpo" and not self.beta:
            raise ConfigError("beta is 0, but dpo needs it: it scales the preference margin (0.1 is usual)")
        if self.beta_target_kl and not (self.has_critic and self.beta):
            raise ConfigError(
                "beta_target_kl adapts beta in ppo: set algorithm to ppo, and beta to a start value above 0"
            )
        if self.loss_type == "cispo" and (self.epsilon_high is None or self.epsilon_high < 1):
            raise ConfigError(
                f"epsilon_high is {self.epsilon_high}, but with loss_type cispo it is the upper bound of the ratio: set it "
                "to 1 or more (5 is usual)"
            )
        if self.importance_sampling_level == "sequence" and self.loss_type not in ("grpo", "dapo", "dr_grpo"):
            raise ConfigError(
                f"importance_sampling_level sequence does not work with loss_type {self.loss_type}: set loss_type to grpo"
            )
        if self.soft_punish_cache >= self.max_completion_length:
            raise ConfigError(
                f"soft_punish_cache ({self.soft_punish_cache}) must be less than max_completion_length "
                f"({self.max_completion_length}): the penalty covers that many tokens before the limit"
            )

    @property
    def has_critic(self) -> bool:
        return self.algorithm in ("ppo", "a2c")

    @property
    def uses_group(self) -> bool:
        """Whether advantages compare a completion with its group."""
        return not self.has_critic and not (self.algorithm == "reinforce" and self.baseline != "group")

    @property
    def kl_in_loss(self) -> bool:
        """Whether the KL is a term of the loss. With a critic it is part of the reward; in dpo, of the margin."""
        return self.beta > 0 and not self.has_critic and self.algorithm != "dpo"

    @property
    def on_policy(self) -> bool:
        """Whether each roll-out has one update: the old policy is then the current one and needs no forward pass."""
        return self.num_iterations == 1 and self.num_mini_batches == 1

    def evaluates_at(self, step: int) -> bool:
        """Whether the policy is evaluated after a step. Step 0 is the baseline; the final evaluation is separate."""
        return step == 0 or (self.eval_steps > 0 and step % self.eval_steps == 0 and step < self.max_steps)

    def notes(self) -> list[str]:
        """Return notes on combinations of settings that are valid but perhaps unintended."""
        usual = {"top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0}
        changed = [f"{name} {getattr(self, name)}" for name, value in usual.items() if getattr(self, name) != value]
        notes = []
        if changed:
            notes.append(
                f"{', '.join(changed)}: completions are not sampled from the trained distribution (off-policy)"
            )
        if self.importance_sampling_level == "sequence" and (self.loss_type != "grpo" or self.epsilon > 0.01):
            notes.append(
                "GSPO is meant for loss_type grpo, epsilon 3e-4 and epsilon_high 4e-4: sequence ratios stay near 1"
            )
        if self.rollout == "vllm" and self.load_in_4bit:
            notes.append(
                "the server samples from 16-bit weights, the trainer has 4-bit ones: importance weights correct for it"
            )
        if self.has_critic and self.adapter:
            notes.append("the critic starts untrained: critic_warmup_steps trains it before the policy")
        return notes
