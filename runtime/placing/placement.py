"""Which submodel runs on which target and device: what was asked for, else the best order whose memory suffices, with
the reasons.

The order of preference among a bundle's usable targets is that of `Engine.rank`, in which targets that were measured
with this bundle on this machine change places among themselves, the fastest first. Of each target, its devices come in
the order in which it names them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from runtime.bundle.manifest import Bundle, Submodel
from runtime.engine import Engine, target, targets
from runtime.errors import EngineUnavailable, InvalidInput, ResourceExhausted, did_you_mean
from runtime.placing import measured, memory
from runtime.placing.devices import Device, Machine, plain
from runtime.placing.memory import show_size

COMPOSED: Final = ("AUTO", "HETERO", "MULTI", "BATCH")
"""OpenVINO's devices that are made of others, as in "HETERO:GPU,CPU"."""
ROLES: Final[Mapping[str, tuple[str, ...]]] = {
    "denoiser": ("unet", "transformer"),
    "vae": ("vae_decoder", "vae_encoder"),
}
"""What --place may call submodels besides their names: the parts of a latent diffusion model (Rombach et al. 2022,
arXiv 2112.10752).
"""


@dataclass(frozen=True)
class PlacementOptions:
    """What is asked of a placement. Nothing of it is given up without a word.

    `place` has a target ("openvino"), a target and its device ("openvino:GPU.1") or a device ("cuda:0") for submodels
    by name or role. `memory_limit` is how many bytes the model may take of each memory. `strict` refuses engines that
    run a part elsewhere. `rows` are files of measured rows, None for those that are found.
    """

    place: Mapping[str, str] = field(default_factory=dict)
    memory_limit: int | None = None
    strict: bool = False
    rows: tuple[Path, ...] | None = None


@dataclass(frozen=True)
class Place:
    """A target and its device, as `Engine.load` takes it. `memory` names the device whose memory is used."""

    target: str
    device: str
    memory: str = "cpu"

    def __str__(self) -> str:
        return f"{self.target}:{self.device}" if self.device else self.target


@dataclass(frozen=True)
class Choice:
    """Where a submodel is to be loaded: at the first of `places` that can. `estimated` is the memory it
    takes at each.
    """

    places: tuple[Place, ...]
    estimated: Mapping[Place, int]


@dataclass(frozen=True)
class Placement:
    """A choice for every submodel by name, and what is worth telling of it. `rooms` limits memories that are shared by
    turns.
    """

    choices: Mapping[str, Choice]
    notes: tuple[str, ...] = ()
    rooms: Mapping[str, int] = field(default_factory=dict)


def parse_place(text: str) -> dict[str, str]:
    """--place: "text_encoder=cpu,unet=openvino:GPU.1". A part without "=" belongs to the one before it, as devices may
    have commas.

    Raises InvalidInput.
    """
    found: dict[str, str] = {}
    last = ""
    for part in text.split(","):
        name, equals, where = (piece.strip() for piece in part.partition("="))
        if not equals and last and part.strip():
            found[last] += f",{part.strip()}"
            continue
        if not equals or not name or not where:
            raise InvalidInput(
                "place", f"has '{part}', expected SUBMODEL=TARGET[:DEVICE] or SUBMODEL=DEVICE, such as text_encoder=cpu"
            )
        if name in found:
            raise InvalidInput("place", f"has {name} twice: name each submodel once")
        found[name], last = where, name
    return found


def place(
    bundle: Bundle,
    wanted: str | None,
    device: str,
    placing: PlacementOptions,
    machine: Machine,
    avoid: Collection[Place] = (),
) -> Placement:
    """Choose for every submodel of a bundle. `wanted` is a target and `device` one of its devices, or "" for any.

    Places to `avoid` are taken only where there is no other.

    Raises NotFound, InvalidInput, EngineUnavailable with the reason of every target, ResourceExhausted where memory
    does not suffice.
    """
    submodels = bundle.manifest.submodels
    places = usable(bundle, order(bundle, wanted, placing, machine), device, machine)
    fixed = {
        name: _usable_for(bundle, name, where, places, placing, machine)
        for name, where in _by_name(placing.place, submodels).items()
    }
    asked = {submodel.name: fixed.get(submodel.name, places) for submodel in submodels}
    asked = {name: [one for one in where if one not in avoid] or where for name, where in asked.items()}
    return _fit(submodels, asked, placing.memory_limit, machine)


def _by_name(place: Mapping[str, str], submodels: Sequence[Submodel]) -> dict[str, str]:
    """Roles replaced by the submodels that have them."""
    names = [submodel.name for submodel in submodels]
    found: dict[str, str] = {}
    for name, where in place.items():
        meant = [name] if name in names else [one for one in ROLES.get(name, ()) if one in names]
        if not meant:
            roles = [role for role, parts in ROLES.items() if set(parts) & set(names)]
            raise InvalidInput(
                "place", f"has the submodel '{name}', which the bundle lacks: {did_you_mean(name, [*names, *roles])}"
            )
        found |= {one: where for one in meant if one not in place or one == name}
    return found


def order(bundle: Bundle, wanted: str | None, placing: PlacementOptions, machine: Machine) -> list[str]:
    """Targets of the bundle, best first, or the one that is wanted. Raises NotFound, EngineUnavailable."""
    if wanted is not None:
        target(wanted)
        if wanted not in bundle.targets:
            built = ", ".join(bundle.targets)
            raise EngineUnavailable(
                f"bundle {bundle.name} was built for {built}, not for {wanted}: build it with --target {wanted}"
            )
        return [wanted]
    known = [name for name in targets() if name in bundle.targets]
    files = measured.default_files() if placing.rows is None else placing.rows
    figures = measured.seconds(bundle.manifest, machine, files)
    return measured.in_order(known, figures) + [name for name in bundle.targets if name not in known]


def usable(bundle: Bundle, names: Iterable[str], device: str, machine: Machine) -> list[Place]:
    """Every device of these targets that can be used, or those called `device`. Raises EngineUnavailable with every
    reason.
    """
    places, reasons = list[Place](), list[str]()
    for name in names:
        if name not in targets():
            reasons.append(f"{name}: not known to this program")
            continue
        found = targets()[name].available()
        if not found.usable:
            reasons.append(f"{name}: {found.reason}")
            continue
        fitting = _matching(name, device, found.devices, machine)
        places += fitting
        if not fitting:
            reasons.append(f"{name}: has no device '{device}' here, it found {', '.join(found.devices)}")
    if not places:
        raise EngineUnavailable(
            f"no target of bundle {bundle.name} is usable here. {'; '.join(reasons) or 'It was built for none'}"
        )
    return places


def _matching(name: str, device: str, devices: Sequence[str], machine: Machine) -> list[Place]:
    """The target's own devices that are called `device`, in its own words, such as "CPU" for "CPU (AMD EPYC)"."""
    short = [one.partition(" (")[0] for one in devices]
    composed, _, parts = device.upper().partition(":")
    if composed in COMPOSED:
        known = {one.upper().partition(".")[0] for one in short}
        if name != "openvino" or any(
            part.strip("- ").partition(".")[0] not in known for part in parts.split(",") if part
        ):
            return []
        return [Place(name, device.upper(), machine.memory_of(parts.split(",")[0] or "cpu").name)]
    return [Place(name, one, machine.memory_of(one).name) for one in short if not device or _is_called(one, device)]


def _is_called(name: str, device: str) -> bool:
    """Whether a target's device is meant by what was said: by its own name, by ours, or by its kind, "cuda" for all of
    them.
    """
    said = device.casefold()
    return said in (name.casefold(), plain(name), plain(name).partition(":")[0])


def _usable_for(
    bundle: Bundle, submodel: str, where: str, places: Sequence[Place], placing: PlacementOptions, machine: Machine
) -> list[Place]:
    """What --place says of a submodel: a target of the bundle, with or without its device, or else a device."""
    name, _, device = where.partition(":")
    if name in bundle.targets:
        return usable(bundle, [name], device, machine)
    everywhere = usable(bundle, order(bundle, None, placing, machine), "", machine)
    composed = [] if where.upper().partition(":")[0] not in COMPOSED else usable(bundle, ["openvino"], where, machine)
    if fitting := composed or [one for one in (*places, *everywhere) if _is_called(one.device, where)]:
        return list(dict.fromkeys(fitting))
    if name in targets():
        order(bundle, name, placing, machine)  # says that the bundle was not built for it
    known = [*bundle.targets, *dict.fromkeys(plain(one.device) for one in everywhere)]
    reasons = [
        f"{other}: {found.reason}" for other, engine in targets().items() if not (found := engine.available()).usable
    ]
    unusable = f". Not usable here are {'; '.join(reasons)}" if reasons else ""
    raise InvalidInput(
        "place",
        f"puts {submodel} on '{where}', which is no target or device here: {did_you_mean(where, known)}{unusable}",
    )


def _fit(
    submodels: Sequence[Submodel], asked: Mapping[str, Sequence[Place]], limit: int | None, machine: Machine
) -> Placement:
    """Put each submodel on the first of its places whose memory has room, the largest submodels first: they gain most.

    Where a memory that is not shared with a later place is too small for all, those that are left over share it by
    turns.
    """
    rooms = {device.name: room for device in machine.devices if (room := _room(device, limit)) is not None}
    left = dict(rooms)
    notes, choices, turns = list[str](), dict[str, Choice](), dict[str, int]()
    for submodel in sorted(submodels, key=lambda submodel: -submodel.nbytes):
        places = asked[submodel.name]
        needs = {one: _estimate(submodel, one) for one in places}
        able = [one for one in places if needs[one] <= rooms.get(one.memory, needs[one])]
        if not able:
            reasons = "; ".join(
                f"{one}: needs {show_size(needs[one])}, has {show_size(rooms[one.memory])}" for one in places
            )
            raise ResourceExhausted(
                f"no memory suffices for {submodel.name}. {reasons}. Free some, or allow more with --memory-limit"
            )
        chosen = next((one for one in able if needs[one] <= left.get(one.memory, needs[one])), None)
        if chosen is None:
            chosen = able[0]
            turns[chosen.memory] = rooms[chosen.memory]
        elif chosen is not places[0]:
            passed = places[: places.index(chosen)]
            told = "; ".join(
                f"{one} has {show_size(max(0, left[one.memory]))} left, {show_size(needs[one])} are needed"
                for one in passed
            )
            notes.append(f"{submodel.name} is on {chosen}: {told}")
        if chosen.memory in left:
            left[chosen.memory] -= needs[chosen]
        others = [one for one in able if one != chosen]
        choices[submodel.name] = Choice((chosen, *others), needs)
    if limit is not None:
        turns = {
            one.memory: rooms[one.memory] for choice in choices.values() for one in choice.places if one.memory in rooms
        }
    if turns:
        told = ", ".join(f"{show_size(room)} of {name}" for name, room in turns.items())
        notes.append(f"submodels take turns in {told}: what was used longest ago is closed when another needs the room")
    return Placement({submodel.name: choices[submodel.name] for submodel in submodels}, tuple(notes), turns)


def _room(device: Device, limit: int | None) -> int | None:
    """Bytes of a device's memory that may be taken; None where nobody knows of a limit."""
    return min((value for value in (device.free or device.memory, limit) if value is not None), default=None)


def _estimate(submodel: Submodel, where: Place) -> int:
    engine: type[Engine] = target(where.target)
    return memory.estimate(submodel, submodel.compute in engine.precisions, where.memory == "cpu")
