"""GGUF files, written by the tools of llama.cpp, and the Modelfile that Ollama reads."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

from rl.config import ConfigError, RunError

CONVERTED_TYPES = ("f32", "f16", "bf16", "q8_0")  # written by llama.cpp's converter itself
QUANTIZED_TYPES = ("q2_k", "q3_k_m", "q4_0", "q4_k_s", "q4_k_m", "q5_k_s", "q5_k_m", "q6_k")  # by llama-quantize

INSTALL_CONVERTER = (
    "git clone llama.cpp into one of these folders and pip install -r llama.cpp/requirements.txt, or leave out --gguf"
)
BUILD_QUANTIZER = "build llama.cpp, or choose q8_0"


def find_tools(gguf_type: str, llama_cpp: str | None) -> dict[str, list[str]]:
    """The commands that write a GGUF file of this type: "convert", and "quantize" if it is needed.

    llama_cpp is the only folder to search before the PATH; None: the usual ones. Raises ConfigError if a tool is missing.
    """
    home = Path.home()
    folders = [Path(llama_cpp)] if llama_cpp else [Path("llama.cpp"), home / "llama.cpp", home / ".unsloth/llama.cpp"]
    tools = {"convert": find_tool(("convert_hf_to_gguf.py", "convert-hf-to-gguf"), folders, INSTALL_CONVERTER)}
    if gguf_type in QUANTIZED_TYPES:
        tools["quantize"] = find_tool(("llama-quantize", "llama-quantize.exe"), folders, BUILD_QUANTIZER)
    return tools


def find_tool(names: tuple[str, ...], folders: list[Path], advice: str) -> list[str]:
    """The command for the first tool of these names, in the folders, their build/bin, or on the PATH."""
    places = [folder / part / name for folder in folders for part in ("", "build/bin") for name in names]
    present = [str(place) for place in places if place.is_file()]
    present += [path for path in map(shutil.which, names) if path]
    if not present:
        searched = ", ".join(map(str, folders))
        raise ConfigError(f"gguf: {names[0]} of llama.cpp is neither in {searched} nor on the PATH: {advice}")
    return [sys.executable, present[0]] if present[0].endswith(".py") else [present[0]]


def convert(tools: dict[str, list[str]], gguf_type: str, merged: Path, file: Path) -> None:
    """Write a GGUF file from the merged model's folder. Raises RunError with the last line that a failing tool prints."""
    if "quantize" not in tools:
        run_tool(tools["convert"], [str(merged), "--outfile", str(file), "--outtype", gguf_type], file, merged)
        return
    unquantized = file.with_name("unquantized.gguf")
    run_tool(tools["convert"], [str(merged), "--outfile", str(unquantized), "--outtype", "bf16"], unquantized, merged)
    run_tool(tools["quantize"], [str(unquantized), str(file), gguf_type.upper()], file, merged)
    unquantized.unlink()


def run_tool(tool: list[str], arguments: list[str], output: Path, merged: Path) -> None:
    try:
        done = subprocess.run([*tool, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        text, status = done.stdout.decode(errors="replace"), done.returncode
    except OSError as error:
        text, status = str(error), 1
    if status or not output.is_file():
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        reason = lines[-1] if lines else f"exit status {status}"
        raise RunError(f"gguf: {Path(tool[-1]).name} failed: {reason}; the merged model is in {merged}")


def modelfile(file_name: str, temperature: float, system_prompt: str | None, chat_template_kwargs: dict) -> str:
    """The Modelfile for `ollama create`, to stand beside the GGUF file of this name."""
    lines = [
        "# Ollama uses the chat template of the GGUF file if it knows one like it. If `ollama show --template`",
        "# prints only {{ .Prompt }}, write the template here as TEMPLATE, in Ollama's syntax.",
        f"FROM ./{file_name}",
        f"PARAMETER temperature {temperature:g}",
    ]
    if chat_template_kwargs:
        lines.append(f"# Trained with these settings of the chat template: {json.dumps(chat_template_kwargs)}")
    if system_prompt:
        lines.append(f'SYSTEM """{system_prompt}"""')
    return "\n".join(lines) + "\n"
