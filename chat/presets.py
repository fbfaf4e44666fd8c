"""Ways to talk with a model, ready to choose: a system prompt and settings. Four of ours; the person adds their own."""

from dataclasses import dataclass, field
from typing import Any

from chat.engine import BadRequest, Sampling
from chat.store import Store


@dataclass(frozen=True)
class Preset:
    """`settings` lie over what the model recommends; what is missing there is as recommended."""

    name: str
    system: str = ""
    settings: dict[str, Any] = field(default_factory=dict)


OURS = (
    Preset("balanced"),
    Preset(
        "precise",
        "Answer precisely and briefly. Keep to what you know, and say so plainly when you do not know something.",
        {"temperature": 0.2, "top_p": 0.9},
    ),
    Preset(
        "creative",
        "Write vividly and in your own voice. Prefer the unexpected word to the usual one.",
        {"temperature": 1.0, "top_p": 0.95, "min_p": 0.05},
    ),
    Preset(
        "code",
        "You are a careful programmer. Give complete, working code in one block, then explain in a few sentences what "
        "matters. Ask when the task is unclear.",
        {"temperature": 0.3, "top_p": 0.9},
    ),
)


def all_of(store: Store, owner: str) -> list[Preset]:
    """Ours, then the person's own by name."""
    own = [Preset(name, body["system"], body["settings"]) for name, body in store.presets(owner).items()]
    return [*OURS, *own]


def keep(store: Store, owner: str, preset: Preset) -> None:
    """Store under a name of the person's; an older one of that name is replaced. Raises BadRequest."""
    name = " ".join(preset.name.split())[:60]
    if not name:
        raise BadRequest("A preset needs a name.")
    if name in {ours.name for ours in OURS}:
        raise BadRequest("{name} is one of the program's own presets: choose another name.", name=name)
    sampling = {field: value for field, value in preset.settings.items() if field in Sampling.__dataclass_fields__}
    Sampling(**{field: value for field, value in sampling.items() if value is not None})
    store.keep_preset(owner, name, {"system": preset.system, "settings": preset.settings})


def forget(store: Store, owner: str, name: str) -> None:
    """Raises BadRequest for one of ours."""
    if name in {ours.name for ours in OURS}:
        raise BadRequest("The program's own presets stay; only yours can be removed.")
    store.keep_preset(owner, name, None)
