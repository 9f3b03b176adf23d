"""Chooses a target and a device for every submodel: the requested ones, else the first in order of preference with
enough memory. Notes give the reasons.

Targets are preferred by `Engine.rank`. Targets that were measured are sorted among themselves by measured time
(`runtime.placing.nearest`). The devices of a target keep the target's own order.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

from runtime.bundle.manifest import Bundle, Submodel
from runtime.engine import Engine, target, targets
from runtime.errors import EngineUnavailable, InvalidInput, ResourceExhausted, did_you_mean
from runtime.placing import measured, memory
from runtime.placing.advice import Advice, advise
from runtime.placing.devices import Device, Machine, plain
from runtime.placing.memory import show_size

COMPOSED: Final = ("AUTO", "HETERO", "MULTI", "BATCH")
"""OpenVINO's virtual devices, which combine others, as in "HETERO:GPU,CPU"."""
ROLES: Final[Mapping[str, tuple[str, ...]]] = {
    "denoiser": ("unet", "transformer"),
    "vae": ("vae_decoder", "vae_encoder"),
}
"""Names that --place accepts besides those of submodels: the parts of a latent diffusion model (Rombach et al. 2022,
arXiv 2112.10752).
"""


PICTURE_CACHE: Final = "128MiB"
"""The usual memory for features of pictures: 13 pictures of LLaVA 1.5 7B."""
PREFIX_CACHE: Final = "1GiB"
"""The usual memory for what decoders have read before: 2,000 positions of LLaVA 1.5 7B."""


@dataclass(frozen=True)
class PlacementOptions:
    """The requested placement. An option that cannot be followed raises an error.

    `place` maps submodels, by name or role, to a target ("openvino"), a target and its device ("openvino:GPU.1") or a
    device ("cuda:0"). `memory_limit` is the number of bytes that the model may use in each memory. `strict` refuses
    engines that run some nodes on another device. For further requests, at most `picture_cache` bytes are held of
    features of pictures and texts, and `prefix_cache` of keys and values of conversations. `rows` lists files of
    benchmark rows; None means the default files.
    """

    place: Mapping[str, str] = field(default_factory=dict)
    memory_limit: int | None = None
    strict: bool = False
    picture_cache: int = 0
    prefix_cache: int = 0
    rows: tuple[Path, ...] | None = None


@dataclass(frozen=True)
class Place:
    """A target and one of its devices, in the spelling of `Engine.load`. `memory` names the device whose memory is
    used.
    """

    target: str
    device: str
    memory: str = "cpu"

    def __str__(self) -> str:
        return f"{self.target}:{self.device}" if self.device else self.target


@dataclass(frozen=True)
class Candidates:
    """Places to load a submodel at, in order of preference, and its estimated memory in bytes at each."""

    places: tuple[Place, ...]
    estimated: Mapping[Place, int]


@dataclass(frozen=True)
class Placement:
    """A choice for every submodel by name, and notes for the user. `rooms` has the bytes of each memory whose submodels
    are loaded in turns. `advice` is what measured figures say; `targets` are those that it could choose from, in order.
    """

    choices: Mapping[str, Candidates]
    notes: tuple[str, ...] = ()
    rooms: Mapping[str, int] = field(default_factory=dict)
    advice: Advice = field(default_factory=Advice)
    targets: tuple[str, ...] = ()


def parse_place(text: str) -> dict[str, str]:
    """Parse --place, such as "text_encoder=cpu,unet=openvino:GPU.1". Raises InvalidInput.

    Names of devices may have commas ("HETERO:GPU,CPU"), so a piece without "=" continues the one before it.
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
    """Choose places for every submodel of a bundle. `wanted` is a target or None, `device` a device or "" for any.

    Places to `avoid` are used only if a submodel has no other.

    Raises NotFound, InvalidInput, EngineUnavailable with the reason of every target, and ResourceExhausted if no memory
    is large enough.
    """
    advice = advice_for(bundle, placing, machine)
    allowed = _allowed(bundle, wanted, device, placing, machine, advice)
    allowed = {name: [one for one in where if one not in avoid] or where for name, where in allowed.items()}
    plan = _fit(bundle.manifest.submodels, allowed, placing.memory_limit, machine)
    names = tuple(dict.fromkeys(one.target for where in allowed.values() for one in where))
    return replace(plan, notes=(*plan.notes, *advice.faults), advice=advice, targets=names)


def needs(
    bundle: Bundle, wanted: str | None, device: str, placing: PlacementOptions, machine: Machine
) -> dict[str, int]:
    """Estimated bytes that a bundle takes of each memory, by the name of its device, where there is room for all of it,
    without its `caches`. The arguments and errors are those of `place`, without ResourceExhausted.
    """
    found: dict[str, int] = {}
    for name, places in _allowed(bundle, wanted, device, placing, machine).items():
        first = places[0]
        found[first.memory] = found.get(first.memory, 0) + _estimate(bundle.submodel(name), first)
    limit = placing.memory_limit
    return {memory: nbytes if limit is None else min(nbytes, limit) for memory, nbytes in found.items()}


def caches(
    bundle: Bundle, wanted: str | None, device: str, placing: PlacementOptions, machine: Machine
) -> dict[str, int]:
    """The most bytes of each memory that a bundle may hold for further requests besides: features in the host's memory,
    and conversations where its decoder is. The arguments and errors are those of `needs`.
    """
    allowed = _allowed(bundle, wanted, device, placing, machine)
    decoders = [allowed[one.name][0].memory for one in bundle.manifest.submodels if one.signature.states]
    found = {"cpu": placing.picture_cache}
    if decoders and placing.memory_limit is None:  # an engine that holds them could not make room for others
        found[decoders[0]] = found.get(decoders[0], 0) + placing.prefix_cache
    return {memory: nbytes for memory, nbytes in found.items() if nbytes}


def _allowed(
    bundle: Bundle,
    wanted: str | None,
    device: str,
    placing: PlacementOptions,
    machine: Machine,
    advice: Advice | None = None,
) -> dict[str, list[Place]]:
    """Places of every submodel, in order of preference. `advice` is that of `advice_for`, where it is known."""
    submodels = bundle.manifest.submodels
    places = usable(bundle, order(bundle, wanted, placing, machine, advice), device, machine)
    fixed = {
        name: _usable_for(bundle, name, where, places, placing, machine)
        for name, where in _by_name(placing.place, submodels).items()
    }
    return {submodel.name: fixed.get(submodel.name, places) for submodel in submodels}


def _by_name(place: Mapping[str, str], submodels: Sequence[Submodel]) -> dict[str, str]:
    """The options of --place with each role replaced by its submodels."""
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


def order(
    bundle: Bundle, wanted: str | None, placing: PlacementOptions, machine: Machine, advice: Advice | None = None
) -> list[str]:
    """The bundle's targets in order of preference, or the wanted one; `advice` is that of `advice_for`, where it is
    known. Raises NotFound, EngineUnavailable.
    """
    if wanted is not None:
        target(wanted)
        if wanted not in bundle.targets:
            built = ", ".join(bundle.targets)
            raise EngineUnavailable(
                f"bundle {bundle.name} was built for {built}, not for {wanted}: build it with --target {wanted}"
            )
        return [wanted]
    known = [name for name in targets() if name in bundle.targets]
    advice = advice or advice_for(bundle, placing, machine)
    return advice.order(known) + [name for name in bundle.targets if name not in known]


def advice_for(bundle: Bundle, placing: PlacementOptions, machine: Machine) -> Advice:
    """What measured figures say of a bundle on this machine."""
    return advise(bundle.manifest, machine, measured.collected(placing.rows))


def usable(bundle: Bundle, names: Iterable[str], device: str, machine: Machine) -> list[Place]:
    """All usable devices of these targets, or those with the name `device`. Raises EngineUnavailable with the reason of
    every target.
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
    """The target's devices with the name `device`, in the target's spelling: "CPU" for "CPU (AMD EPYC)"."""
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
    """Whether `device` names this device of a target: by the target's name, by this program's ("cuda:0"), or by its
    kind ("cuda").
    """
    wanted = device.casefold()
    return wanted in (name.casefold(), plain(name), plain(name).partition(":")[0])


def _usable_for(
    bundle: Bundle, submodel: str, where: str, places: Sequence[Place], placing: PlacementOptions, machine: Machine
) -> list[Place]:
    """Places for one submodel from its value in --place: a target of the bundle, with or without a device, or a device
    alone.
    """
    name, _, device = where.partition(":")
    if name in bundle.targets:
        return usable(bundle, [name], device, machine)
    everywhere = usable(bundle, order(bundle, None, placing, machine), "", machine)
    composed = [] if where.upper().partition(":")[0] not in COMPOSED else usable(bundle, ["openvino"], where, machine)
    if fitting := composed or [one for one in (*places, *everywhere) if _is_called(one.device, where)]:
        return list(dict.fromkeys(fitting))
    if name in targets():
        order(bundle, name, placing, machine)  # raises: the bundle was not built for it
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
    submodels: Sequence[Submodel], allowed: Mapping[str, Sequence[Place]], limit: int | None, machine: Machine
) -> Placement:
    """Give each submodel the first of its places with enough free memory. The largest submodels choose first: they gain
    most from the preferred device.

    A submodel that fits in no memory beside the others shares one of them: its engines are loaded in turns.
    """
    rooms = {device.name: room for device in machine.devices if (room := _room(device, limit)) is not None}
    left = dict(rooms)
    notes, choices, turns = list[str](), dict[str, Candidates](), dict[str, int]()
    for submodel in sorted(submodels, key=lambda submodel: -submodel.nbytes):
        places = allowed[submodel.name]
        needs = {one: _estimate(submodel, one) for one in places}
        able = [one for one in places if needs[one] <= rooms.get(one.memory, needs[one])]
        if not able:
            reasons = "; ".join(
                f"{one}: needs {show_size(needs[one])}, has {show_size(rooms[one.memory])}" for one in places
            )
            raise ResourceExhausted(
                f"no device has enough memory for {submodel.name}. {reasons}. "
                "Free some, or allow more with --memory-limit"
            )
        chosen = next((one for one in able if needs[one] <= left.get(one.memory, needs[one])), None)
        if chosen is None:
            chosen = able[0]
            turns[chosen.memory] = rooms[chosen.memory]
        elif chosen is not places[0]:
            passed = places[: places.index(chosen)]
            reasons = "; ".join(
                f"{one} has {show_size(max(0, left[one.memory]))} left, {show_size(needs[one])} are needed"
                for one in passed
            )
            notes.append(f"{submodel.name} is on {chosen}: {reasons}")
        if chosen.memory in left:
            left[chosen.memory] -= needs[chosen]
        others = [one for one in able if one != chosen]
        choices[submodel.name] = Candidates((chosen, *others), needs)
    if limit is not None:
        turns = {
            one.memory: rooms[one.memory] for choice in choices.values() for one in choice.places if one.memory in rooms
        }
    if turns:
        shared = ", ".join(f"{show_size(room)} of {name}" for name, room in turns.items())
        notes.append(
            f"submodels take turns in {shared}: the least recently used one is closed when another needs memory"
        )
    return Placement({submodel.name: choices[submodel.name] for submodel in submodels}, tuple(notes), turns)


def _room(device: Device, limit: int | None) -> int | None:
    """Bytes of a device's memory that may be used; None if no limit is known."""
    return min((value for value in (device.free or device.memory, limit) if value is not None), default=None)


def _estimate(submodel: Submodel, where: Place) -> int:
    engine: type[Engine] = target(where.target)
    return memory.estimate(submodel, submodel.precision.compute in engine.precisions, where.memory == "cpu")
