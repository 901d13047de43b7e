"""GGUF files, written by the tools of llama.cpp, and the Modelfile for Ollama."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

from rl.config import ConfigError, RunError

CONVERTED_TYPES = ("f32", "f16", "bf16", "q8_0")  # written by llama.cpp's converter
QUANTIZED_TYPES = ("q2_k", "q3_k_m", "q4_0", "q4_k_s", "q4_k_m", "q5_k_s", "q5_k_m", "q6_k")  # by llama-quantize


def find_tools(gguf_type: str, llama_cpp: str | None) -> dict[str, list[str]]:
    """Find the commands that write a GGUF file of this type: "convert", and "quantize" for a quantized type.

    Args:
        llama_cpp: The only folder to search before the PATH; None searches the usual folders.

    Raises:
        ConfigError: If a tool is missing.
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
    """Return the command for the first of the names found in the folders, their build/bin, or on the PATH."""
    candidates = [folder / part / name for folder in folders for part in ("", "build/bin") for name in names]
    tools = [str(path) for path in candidates if path.is_file()]
    tools += [path for path in map(shutil.which, names) if path]
    if not tools:
        folder_list = ", ".join(map(str, folders))
        raise ConfigError(f"gguf: {names[0]} of llama.cpp is neither in {folder_list} nor on the PATH: {advice}")
    return [sys.executable, tools[0]] if tools[0].endswith(".py") else [tools[0]]


def convert(tools: dict[str, list[str]], gguf_type: str, merged: Path, file: Path) -> None:
    """Write a GGUF file from the merged model's folder. Raises RunError with the last output line of a failing tool."""
    if "quantize" not in tools:
        run_tool([*tools["convert"], str(merged), "--outfile", str(file), "--outtype", gguf_type], merged)
        return
    unquantized = file.with_name("unquantized.gguf")
    run_tool([*tools["convert"], str(merged), "--outfile", str(unquantized), "--outtype", "bf16"], merged)
    run_tool([*tools["quantize"], str(unquantized), str(file), gguf_type.upper()], merged)
    unquantized.unlink()


def run_tool(command: list[str], merged: Path) -> None:
    """Run a tool of llama.cpp. Raises RunError with its last output line if it fails."""
    try:
        subprocess.run(
            command, check=True, text=True, errors="replace", stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
    except (OSError, subprocess.CalledProcessError) as error:
        lines = (getattr(error, "stdout", None) or str(error)).strip().splitlines()
        tool = Path(command[1 if command[0] == sys.executable else 0]).name
        raise RunError(f"gguf: {tool} failed: {lines[-1]}; the merged model is in {merged}") from error


def modelfile(file_name: str, temperature: float, system_prompt: str | None, chat_template_kwargs: dict) -> str:
    """Return a Modelfile for `ollama create`, to be saved next to the GGUF file."""
    text = "# Ollama uses the chat template of the GGUF file if it supports it. If `ollama show --template`\n"
    text += "# prints only {{ .Prompt }}, add the template here as TEMPLATE, in Ollama's syntax.\n"
    text += f"FROM ./{file_name}\nPARAMETER temperature {temperature:g}\n"
    if chat_template_kwargs:
        text += f"# The model was trained with these chat template settings: {json.dumps(chat_template_kwargs)}\n"
    if system_prompt:
        text += f'SYSTEM """{system_prompt}"""\n'
    return text
