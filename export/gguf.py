"""GGUF files, written by the tools of llama.cpp, and the Modelfile that Ollama reads."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

from rl.config import ConfigError, RunError

CONVERTED_TYPES = ("f32", "f16", "bf16", "q8_0")  # written by llama.cpp's converter itself
QUANTIZED_TYPES = ("q2_k", "q3_k_m", "q4_0", "q4_k_s", "q4_k_m", "q5_k_s", "q5_k_m", "q6_k")  # by llama-quantize


def find_tools(gguf_type: str, llama_cpp: str | None) -> dict[str, list[str]]:
    """The commands that write a GGUF file of this type: "convert", and "quantize" if it is needed.

    llama_cpp is the only folder to search before the PATH; None: the usual ones. Raises ConfigError if a tool is missing.
    """
    home = Path.home()
    folders = [Path(llama_cpp)] if llama_cpp else [Path("llama.cpp"), home / "llama.cpp", home / ".unsloth/llama.cpp"]
    advice = "git clone llama.cpp into one of them and pip install -r llama.cpp/requirements.txt, or leave out --gguf"
    tools = {"convert": find_tool(("convert_hf_to_gguf.py", "convert-hf-to-gguf"), folders, advice)}
    if gguf_type in QUANTIZED_TYPES:
        advice = "build llama.cpp, or choose q8_0"
        tools["quantize"] = find_tool(("llama-quantize", "llama-quantize.exe"), folders, advice)
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
        run_tool([*tools["convert"], str(merged), "--outfile", str(file), "--outtype", gguf_type], merged)
        return
    whole = file.with_name("unquantized.gguf")
    run_tool([*tools["convert"], str(merged), "--outfile", str(whole), "--outtype", "bf16"], merged)
    run_tool([*tools["quantize"], str(whole), str(file), gguf_type.upper()], merged)
    whole.unlink()


def run_tool(command: list[str], merged: Path) -> None:
    try:
        subprocess.run(
            command, check=True, text=True, errors="replace", stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
    except (OSError, subprocess.CalledProcessError) as error:
        lines = (getattr(error, "stdout", None) or str(error)).strip().splitlines()
        tool = Path(command[1 if command[0] == sys.executable else 0]).name
        raise RunError(f"gguf: {tool} failed: {lines[-1]}; the merged model is in {merged}") from error


def modelfile(file_name: str, temperature: float, system_prompt: str | None, chat_template_kwargs: dict) -> str:
    """The Modelfile for `ollama create`, to stand beside the GGUF file of this name."""
    text = "# Ollama uses the chat template of the GGUF file if it knows one like it. If `ollama show --template`\n"
    text += "# prints only {{ .Prompt }}, write the template here as TEMPLATE, in Ollama's syntax.\n"
    text += f"FROM ./{file_name}\nPARAMETER temperature {temperature:g}\n"
    if chat_template_kwargs:
        text += f"# Trained with these settings of the chat template: {json.dumps(chat_template_kwargs)}\n"
    if system_prompt:
        text += f'SYSTEM """{system_prompt}"""\n'
    return text
