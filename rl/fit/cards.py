"""Where a run is to fit: the card or the CPU of this machine, or a card that is named by its memory. Imports no torch without need."""

import re
import shutil
from dataclasses import dataclass

from rl.config import Config, ConfigError

MB, GB = 2**20, 2**30
CONTEXT = 0.5 * GB  # of CUDA, outside of what PyTorch counts
FRAGMENTATION = 1.08  # of PyTorch's allocator on CUDA
IMPORTS = 0.4 * GB  # resident after the imports, on a CPU


@dataclass(frozen=True)
class Card:
    """A card as its maker specifies it."""

    name: str
    gigabytes: float  # as PyTorch sees them
    bandwidth: float  # of its memory, GB/s
    tflops: float  # dense products of 16-bit matrices, summed up in fp32
    bf16: bool = True


CARDS = (  # those that are common; of several with the same memory the usual one comes first
    Card("RTX 3050", 6, 168, 13.5),  # the one with 6 GB
    Card("RTX 2060", 6, 336, 25.8, bf16=False),
    Card("RTX 4060", 8, 272, 30.2),
    Card("RTX 3050", 8, 224, 18.2),
    Card("RTX 3060", 12, 360, 25.5),
    Card("T4", 15, 320, 65, bf16=False),
    Card("RTX 4060 Ti", 16, 288, 44.1),
    Card("RTX 3090", 24, 936, 71),
    Card("RTX 4090", 24, 1008, 165),
)


@dataclass
class Machine:
    """Where a run is to fit."""

    device: str  # cpu or cuda
    dtype: str
    memory: float  # bytes
    name: str
    card: Card | None = None  # where its speed is known; of a card that only its memory names, a usual one

    def free(self) -> float:
        """What the engine finds there before anything of the run is loaded."""
        return self.memory - (CONTEXT if self.device == "cuda" else IMPORTS)

    def needed(self, peak: float) -> float:
        """What must be there for a predicted peak."""
        return peak * FRAGMENTATION + CONTEXT if self.device == "cuda" else peak + IMPORTS


def find_machine(config: Config) -> Machine:
    """The card of `gpu_memory` GB, else what is here. Raises ConfigError."""
    if config.gpu_memory is not None:
        if not config.gpu_memory > 0:
            raise ConfigError(f"gpu_memory is {config.gpu_memory:g}, but is that of the card in GB, such as 12")
        dtype = "bfloat16" if config.dtype == "auto" else config.dtype
        card = usual_card(config.gpu_memory, bf16=dtype != "float16")
        return Machine("cuda", dtype, config.gpu_memory * GB, f"a CUDA card of {config.gpu_memory:g} GB", card)
    if config.device != "cpu" and shutil.which("nvidia-smi"):  # else torch has none to see, and takes seconds to import
        import torch

        if torch.cuda.is_available():
            auto = "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"
            free, whole = torch.cuda.mem_get_info()
            free += CONTEXT  # which this look at it has taken
            model = torch.cuda.get_device_name()
            dtype = auto if config.dtype == "auto" else config.dtype
            return Machine("cuda", dtype, free, f"{model} with {free / GB:.1f} GB free", known_card(model, whole / GB))
    if config.device == "cuda":
        raise ConfigError("device is cuda, but no NVIDIA GPU is seen here: name a card's memory, --gpu-memory 12")
    import psutil

    memory = psutil.virtual_memory().available
    dtype = "float32" if config.dtype == "auto" else config.dtype
    return Machine("cpu", dtype, memory, f"the CPU, with {memory / GB:.1f} GB of memory free")


def usual_card(gigabytes: float, bf16: bool) -> Card:
    """The smallest known card of at least so much memory, else the largest, with or without bf16."""
    of_kind = [card for card in CARDS if card.bf16 == bf16]
    return next((card for card in of_kind if card.gigabytes >= gigabytes), of_kind[-1])


def known_card(model: str, gigabytes: float) -> Card | None:
    """The card that the driver calls by this name, "NVIDIA GeForce RTX 3060"; None for one that is not known here.

    A laptop's card is slower than the one that has its name, and is not known.
    """
    name = re.sub(r"^(NVIDIA |Tesla |GeForce )+", "", model)
    named = [card for card in CARDS if card.name == name]
    return min(named, key=lambda card: abs(card.gigabytes - gigabytes), default=None)
