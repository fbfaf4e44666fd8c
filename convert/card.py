"""The model card of a pushed GGUF: where it comes from, how far it is from its source, how to run it."""

import shlex
from collections.abc import Sequence
from pathlib import Path

from convert.metadata import Provenance
from convert.report import describe, table
from convert.request import Result


def front_matter(provenance: Provenance) -> dict[str, object]:
    """`base_model_relation: quantized` hangs the file under its source on the hub."""
    found: dict[str, object] = {"library_name": "gguf", "pipeline_tag": "text-generation", "tags": ["qwen3", "chat"]}
    if provenance.license:
        found["license"] = provenance.license
    base = [provenance.repo] if provenance.repo else list(provenance.base_models)
    if base:
        found |= {"base_model": base, "base_model_relation": "quantized"}
    return found


def write_card(provenance: Provenance, results: Sequence[Result], repo: str) -> str:
    import yaml

    rows = [describe(result.path) for result in results]
    smallest = min(results, key=lambda result: result.size)
    source = provenance.repo or provenance.name
    quants = [result.quant for result in results]
    command = shlex.join(["python", "-m", "convert", source, smallest.path.name, "--quant", *quants])
    lines = [
        "---",
        yaml.safe_dump(front_matter(provenance), sort_keys=False).strip(),
        "---",
        "",
        f"# {repo.rpartition('/')[2]}",
        "",
        f"{provenance.name} as GGUF, for llama.cpp and what is built on it.",
        "",
        table(rows),
        "",
        "KLD: KL divergence of the next token's distribution from that of the source's weights in float32, nats per token,",
        "on chat-formatted text; 95 % intervals by bootstrap over windows. Lower is closer. A dash was not measured.",
        "",
        "## Files",
        "",
        *(f"- `{result.path.name}`: sha256 `{result.sha256}`" for result in results),
        "",
        "Beside each file lies a `.gguf.json` with the hashes of the sources and of every tensor.",
        "",
        "## Use",
        "",
        "```",
        f"llama-cli -hf {repo} -hff {smallest.path.name}",
        "```",
        "",
        "## Made with",
        "",
        "```",
        command,
        "```",
        "",
    ]
    return "\n".join(lines)


def upload(repo: str, provenance: Provenance, results: Sequence[Result]) -> str:
    """Files, manifests and card in one commit; returns its address. Raises ConvertError."""
    from convert.hub import push

    files: dict[str, Path | bytes] = {"README.md": write_card(provenance, results, repo).encode()}
    for result in results:
        files |= {result.path.name: result.path, result.manifest.name: result.manifest}
    return push(repo, files, f"Add {', '.join(result.quant for result in results)}")
