"""How near a quantized bundle comes to the same model without quantization: measured once, when it is built, and kept
in the bundle.

    quality/quality.json      this file's `Quality`
    quality/*.png             the pictures it names: drawn by both models, or shown to both

Both models run on the same machine, one request at a time, through the pipelines that users' requests take. Speed is
not told by these runs but by `export.report.speed`, whose figures lie in the same file.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final, Literal, TypeVar, cast, get_args

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, ValidationError

from calibration.ground.progress import each, followed, phase
from calibration.observe.metrics import (
    PEAK,
    Comparison,
    gmsd,
    kl_divergence,
    perplexity,
    psnr_db,
    snr_db,
    ssim,
    token_agreement,
)
from calibration.requests.built_in import BUILT_IN, TRIES, Asked, Requests, accepted
from export.report.speed import Measured, Speed
from export.report.tasks import TASKS, right
from runtime.bundle.manifest import Bundle, Frozen, Inside, Submodel
from runtime.bundle.signature import Array
from runtime.engine import Slot
from runtime.errors import BundleError, EngineError, InvalidInput, NotFound
from runtime.language.text import Message
from runtime.pipeline import Call, Event, Outputs, Pipeline, drive, run_call
from runtime.placing.loading import LoadedModel
from runtime.tasks.chat import ChatRequest, Finished, TextDelta
from runtime.tasks.image import ImageReady, ImageRequest
from runtime.vision.images import Picture, decoded, encode_image
from samples.world.questions import test_questions
from samples.world.scenes import test_prompts

R = TypeVar("R", ImageRequest, ChatRequest)
Samples = Mapping[str, Sequence[Mapping[str, Array]]]
"""Inputs of each submodel, one mapping a call: what `calibration.capture.data.capture` gives."""
Pictures = dict[str, Picture]
"""Pictures by their path in the bundle."""

FOLDER: Final = "quality"
QUALITY: Final = f"{FOLDER}/quality.json"
SEED: Final = 1000
"""Requests are drawn from this seed and those after it. Calibration begins at 0 and stays far below."""
MAX_TOKENS: Final = 32
PROMPTS: Final = (
    "a wooden sailing boat on a calm sea at dawn, photograph",
    "an old man playing chess in a park, oil painting",
    "a plate of pasta with basil, food photography",
    "a stone bridge over a river in autumn, watercolour",
    "a grey cat asleep on a stack of books",
    "a robot watering plants in a greenhouse, digital art",
    "a red tram in a snowy city street at night",
    "a desert road under a starry sky, long exposure",
)
"""Prompts of general models. None of them is calibrated with."""

Measure = Literal["submodel_snr_db", "latents_snr_db", "next_token_agreement"]
UNITS: Final[Mapping[Measure, str]] = {"submodel_snr_db": " dB", "latents_snr_db": " dB", "next_token_agreement": ""}
TITLES: Final[Mapping[Measure, str]] = {
    "submodel_snr_db": "SNR of every submodel's outputs",
    "latents_snr_db": "SNR of the final latents, median of all pictures",
    "next_token_agreement": "Agreement on the next token",
}


class Floor(Frozen):
    """The least that a bundle of this `quant` must reach in one measure, and why it is set there.

    The reason is what noise of known size did to the samples' work, or another floor: nothing that changes with the
    next build.
    """

    quant: str
    measure: Measure
    least: float
    reason: str

    def __str__(self) -> str:
        return f"{self.least:g}{UNITS[self.measure]}"


FLOORS: Final = (
    Floor(
        quant="int8",
        measure="submodel_snr_db",
        least=20,
        reason="Noise of 20 dB on the logits cost shapes-vlm 3 of 96 right answers.",
    ),
    Floor(
        quant="int8",
        measure="latents_snr_db",
        least=15,
        reason="Noise in the UNet that left 19 dB or 16 dB cost shapes-diffusion one right picture at most.",
    ),
    Floor(
        quant="int8",
        measure="next_token_agreement",
        least=0.95,
        reason="Noise on the logits that left 96 % cost shapes-vlm 17 of 96 right answers.",
    ),
    Floor(
        quant="int4",
        measure="submodel_snr_db",
        least=12,
        reason="Noise of 12 dB on the logits cost shapes-vlm 3 of 96 right answers, of 8 dB 8, of 5 dB 17.",
    ),
    Floor(
        quant="int4",
        measure="latents_snr_db",
        least=10,
        reason="Noise in the UNet that left 11 dB cost shapes-diffusion 1 of 11 right pictures, 7 dB 3 of 11.",
    ),
    Floor(
        quant="int4",
        measure="next_token_agreement",
        least=0.85,
        reason="Lower than at int8, since 4 bits may swap two tokens that are about as likely.",
    ),
)
"""Below these a build is taken for failed. Noise: Gaussian, the same in every call, on the one output, so that its SNR
is the one told.
"""


@dataclass(frozen=True)
class Effort:
    """How much is drawn and asked: `pictures` and `questions` that the report shows, and `cases` of a sample's own
    task.

    `steps` of each picture; None is as many as the model's users get.
    """

    pictures: int = 4
    steps: int | None = None
    questions: int = 8
    cases: int = 16


class OutputQuality(Measured):
    """One output of a submodel over all its calls: what `calibration.observe.metrics` says of it. The peak of the PSNR
    is its largest magnitude.
    """

    name: str
    snr_db: float
    psnr_db: float
    cosine: float


class SubmodelQuality(Measured):
    """A submodel alone: both given the same inputs, those that the reference model's pipeline gave its own."""

    name: str
    precision: str
    reference_precision: str
    calls: int = Field(ge=0)
    outputs: tuple[OutputQuality, ...]


class PictureQuality(Measured):
    """One prompt drawn by both models from the same noise. Latents are those that the VAE decoder is given.

    `gmsd` is None in what versions wrote that did not measure it.
    """

    prompt: str
    seed: int
    latents_snr_db: float
    psnr_db: float
    ssim: float
    gmsd: float | None = None
    reference: Inside
    quantized: Inside


class AnswerQuality(Measured):
    """One question answered greedily by both models.

    `token_agreement` compares the two answers place by place. The other figures come from giving the quantized model
    the reference's answer token by token (teacher forcing), so that each of its `tokens` is judged alone:
    `next_token_agreement` is the share of them that the quantized model would have chosen too, `kl_divergence` the mean
    distance of the two distributions in nats, and the perplexities tell how unexpected the reference's answer is to
    either model.
    """

    question: str
    picture: Inside | None
    reference: str
    quantized: str
    tokens: int = Field(ge=1)
    token_agreement: float
    next_token_agreement: float
    kl_divergence: float
    reference_perplexity: float = Field(ge=1)
    quantized_perplexity: float = Field(ge=1)


class TaskQuality(Measured):
    """Held-out cases of the task that a sample was trained for, and how many of them each model does right."""

    task: str
    cases: int = Field(ge=1)
    reference_right: int
    quantized_right: int


class Quality(Measured):
    """Everything measured of one quantized bundle. `speed` is None when it was not timed."""

    quant: str
    reference_quant: str
    target: str
    reference_target: str
    device: str
    submodels: tuple[SubmodelQuality, ...]
    pictures: tuple[PictureQuality, ...] = ()
    answers: tuple[AnswerQuality, ...] = ()
    task: TaskQuality | None = None
    speed: Speed | None = None

    @property
    def tokens(self) -> int:
        """Tokens of all the reference's answers."""
        return sum(answer.tokens for answer in self.answers)

    def over_pictures(self, name: str) -> float:
        """The median of a figure of `PictureQuality`: one picture that turns out otherwise does not decide it."""
        return statistics.median(getattr(picture, name) for picture in self.pictures)

    @property
    def perplexity_change(self) -> float:
        """How many times as unexpected the reference's answers, as one text, are to the quantized model; 1 is no
        change.
        """
        return self.over_text("quantized_perplexity") / self.over_text("reference_perplexity")

    def summary(self) -> dict[str, float]:
        """The figures in short, for the manifest: the worst submodel, medians of the pictures, means of the tokens, the
        task's score.
        """
        found = {measure: min(figures.values()) for measure in get_args(Measure) if (figures := self.found(measure))}
        if self.pictures:
            found |= {
                name: self.over_pictures(name)
                for name in ("psnr_db", "ssim", "gmsd")
                if getattr(self.pictures[0], name) is not None
            }
        if self.answers:
            found |= {name: self.over_tokens(name) for name in ("token_agreement", "kl_divergence")}
            found["perplexity_change"] = self.perplexity_change
        if self.task:
            found |= {
                f"{of}_right": getattr(self.task, f"{of}_right") / self.task.cases for of in ("reference", "quantized")
            }
        return found

    def over_tokens(self, name: str) -> float:
        """The mean of a figure of `AnswerQuality`, every token counted alike."""
        return sum(answer.tokens * float(getattr(answer, name)) for answer in self.answers) / self.tokens

    def over_text(self, name: str) -> float:
        """A perplexity of `AnswerQuality` over all answers as one text."""
        return math.exp(sum(answer.tokens * math.log(getattr(answer, name)) for answer in self.answers) / self.tokens)

    def found(self, measure: Measure) -> dict[str, float]:
        """The figures that a floor of this measure is about, by what they are of. Empty where the measure does not
        apply.
        """
        if measure == "submodel_snr_db":
            return {
                f"SNR of {submodel.name}.{output.name}": output.snr_db
                for submodel in self.submodels
                for output in submodel.outputs
            }
        if measure == "latents_snr_db":
            return {"median SNR of the final latents": self.over_pictures("latents_snr_db")} if self.pictures else {}
        return {"agreement on the next token": self.over_tokens("next_token_agreement")} if self.answers else {}

    def shortfalls(self, quant: str) -> list[str]:
        """What is below its floor at this quantization, or was not measured though there is a floor for it; empty where
        all is well.
        """
        faults = [
            f"{name} is {figure:.3g}{UNITS[floor.measure]}, expected at least {floor} at {quant}"
            for floor in floors(quant)
            for name, figure in self.found(floor.measure).items()
            if not figure >= floor.least
        ]
        if floors(quant):
            faults += [
                f"{submodel.name}: was not measured, no call of it was captured"
                for submodel in self.submodels
                if not submodel.calls
            ]
        return faults


def floors(quant: str) -> list[Floor]:
    """The floors of a quantization; none for "none" and for "int8-naive", which is there to be compared with.

    A search has those of int4, the lowest form that it gives to layers; what it may cost beside is asked for with
    --max-drop.
    """
    quant = "int4" if quant == "auto" else quant
    return [floor for floor in FLOORS if floor.quant == quant]


def measure(
    quantized: LoadedModel,
    reference: LoadedModel,
    samples: Samples,
    effort: Effort | None = None,
) -> tuple[Quality, Pictures]:
    """Compare a quantized model with the same one before quantization; the pictures are those that the result names.

    `samples` are the inputs to compare each submodel on; of submodels with states, the calls of the answers are
    compared instead. Raises BundleError when the two are not the same model, EngineError when a submodel gives numbers
    that are not finite.
    """
    _check_alike(quantized, reference)
    effort = effort or Effort()
    pictures: Pictures = {}
    drawn: list[PictureQuality] = []
    answers: list[AnswerQuality] = []
    with phase(0.0, 0.3):
        compared = _compare_calls(quantized, reference, samples)
    with phase(0.3, 0.8):
        if reference.task == "image":
            prompts = _image_requests(reference, effort)
            drawn = [_picture(i, one, quantized, reference, pictures) for i, one in enumerate(each("picture", prompts))]
        else:
            questions = _accepted(reference, _chat_requests(effort.questions), effort.questions)
            answers = [
                _answer(i, one, quantized, reference, pictures, compared)
                for i, one in enumerate(each("question", questions))
            ]
    with phase(0.8, 1.0):
        task = _task(quantized, reference, effort.cases)
    quality = Quality(
        quant=quantized.bundle.manifest.quant,
        reference_quant=reference.bundle.manifest.quant,
        target=quantized.target,
        reference_target=reference.target,
        device=quantized.device,
        submodels=tuple(
            _submodel(submodel, reference.bundle.submodel(submodel.name), compared[submodel.name])
            for submodel in quantized.bundle.manifest.submodels
        ),
        pictures=tuple(drawn),
        answers=tuple(answers),
        task=task,
    )
    return quality, pictures


def save_quality(root: Path, quality: Quality, pictures: Pictures) -> None:
    """Write what `measure` gave into the folder of a bundle that is being built."""
    (root / FOLDER).mkdir(exist_ok=True)
    for path, picture in pictures.items():
        (root / path).write_bytes(encode_image(picture))
    (root / QUALITY).write_text(quality.model_dump_json(indent=1))


def load_quality(bundle: Bundle) -> Quality:
    """What was measured of a bundle. Raises NotFound when nothing was, BundleError when it cannot be read."""
    path = bundle.root / QUALITY
    if not path.is_file():
        if bundle.manifest.quant == "none":
            raise NotFound(
                f"bundle {bundle.root} has no quality report: it is not quantized, so there is nothing to compare it "
                "with"
            )
        again = f"enginecast build SOURCE --quality full --quant {bundle.manifest.quant} --output {bundle.root} --force"
        raise NotFound(f"bundle {bundle.root} has no quality report, expected {QUALITY}: build it again with `{again}`")
    try:
        return Quality.model_validate_json(path.read_bytes())
    except ValidationError as error:
        faults = "; ".join(f"{'.'.join(map(str, fault['loc'])) or 'file'}: {fault['msg']}" for fault in error.errors())
        raise BundleError(
            f"{path} cannot be read ({faults}): it is damaged, or another version of this program wrote it. Build the "
            "bundle again"
        ) from None


def _check_alike(quantized: LoadedModel, reference: LoadedModel) -> None:
    one, other = quantized.bundle.manifest, reference.bundle.manifest
    names = [[submodel.name for submodel in manifest.submodels] for manifest in (one, other)]
    if (one.pipeline, one.source.fingerprint, names[0]) != (other.pipeline, other.source.fingerprint, names[1]):
        raise BundleError(
            f"bundle {one.name} ({', '.join(names[0])}) and bundle {other.name} ({', '.join(names[1])}) are not of the "
            "same checkpoint: "
            "compare two that were built from one source"
        )


@dataclass
class _Compared:
    """The outputs of one submodel, compared call by call."""

    calls: int = 0
    outputs: dict[str, Comparison] = field(default_factory=dict)

    def add(self, submodel: str, reference: Outputs, quantized: Outputs) -> None:
        self.calls += 1
        for name, array in reference.items():
            try:
                self.outputs.setdefault(name, Comparison()).add(array, quantized[name])
            except InvalidInput as error:
                raise EngineError(
                    f"submodel '{submodel}', output '{name}': {error}. Build with a higher precision"
                ) from None


def _compare_calls(quantized: LoadedModel, reference: LoadedModel, samples: Samples) -> dict[str, _Compared]:
    """Both engines of each submodel without states on the captured inputs."""
    compared = {submodel.name: _Compared() for submodel in quantized.bundle.manifest.submodels}
    for name, found in each("submodel", compared.items()):
        stateless = not quantized.bundle.submodel(name).signature.states
        for inputs in each("call", samples.get(name, ()) if stateless else ()):
            found.add(name, reference.engines[name].run(inputs), quantized.engines[name].run(inputs))
    return compared


def _submodel(quantized: Submodel, reference: Submodel, compared: _Compared) -> SubmodelQuality:
    return SubmodelQuality(
        name=quantized.name,
        precision=quantized.precision,
        reference_precision=reference.precision,
        calls=compared.calls,
        outputs=tuple(
            OutputQuality(name=name, snr_db=one.snr_db, psnr_db=one.psnr_db(), cosine=one.cosine)
            for name, one in compared.outputs.items()
        ),
    )


def _accepted(model: LoadedModel, requests: Iterable[R], wanted: int) -> list[R]:
    """The first `wanted` requests that the model can read. Raises what it raised when there is none."""

    def ready(asked: Asked) -> None:
        model.pipeline(asked.request).close()

    tried = Requests(model.bundle.manifest.pipeline, BUILT_IN, (Asked("", request) for request in requests))
    return [cast(R, asked.request) for asked, _ in accepted(ready, tried, wanted)]


def _image_requests(model: LoadedModel, effort: Effort) -> list[ImageRequest]:
    """Prompts of what the model was trained on, as far as that is known."""
    scenes = [scene.caption for scene in test_prompts(effort.pictures, SEED)]
    prompts = scenes if model.bundle.manifest.source.name in TASKS else [*PROMPTS, *scenes]
    requests = (ImageRequest(prompt, steps=effort.steps, seed=SEED + i) for i, prompt in enumerate(prompts))
    return _accepted(model, requests, effort.pictures)


def _chat_requests(count: int) -> Iterator[ChatRequest]:
    """Every kind of question in turn, answered greedily; those to try where the model cannot read some."""
    for case in test_questions(TRIES * count, SEED):
        yield ChatRequest(
            (Message("user", (case.picture, case.question)),),
            max_tokens=MAX_TOKENS,
            temperature=0.0,
            repetition_penalty=1.0,
        )


@dataclass(frozen=True)
class _Ran:
    events: list[Event]

    def one(self, kind: type[Any]) -> Any:
        """The one event of that kind."""
        (event,) = (event for event in self.events if isinstance(event, kind))
        return event

    @property
    def text(self) -> str:
        return "".join(event.text for event in self.events if isinstance(event, TextDelta))


def _run(
    model: LoadedModel,
    request: ImageRequest | ChatRequest,
    watch: Callable[[Pipeline], Pipeline] = lambda pipeline: pipeline,
) -> _Ran:
    return _Ran(list(followed(drive(watch(model.pipeline(request)), model.engines), MAX_TOKENS)))


def _answering(pipeline: Pipeline, seen: Callable[[Call, Outputs], Outputs]) -> Pipeline:
    """The same pipeline, but each call is answered with what `seen` makes of its outputs."""
    outputs: Outputs | None = None
    try:
        while True:
            item = pipeline.send(outputs)
            outputs = yield item
            if isinstance(item, Call):
                assert outputs is not None, "a driver answers a call with its outputs"
                outputs = seen(item, outputs)
    except StopIteration:
        return
    finally:
        pipeline.close()


def _picture(
    i: int, request: ImageRequest, quantized: LoadedModel, reference: LoadedModel, pictures: Pictures
) -> PictureQuality:
    """Draw one request with both models, and keep the pictures."""
    (wanted, image), (got, other) = (_draw(model, request) for model in (reference, quantized))
    paths = [f"{FOLDER}/picture-{i}-{which}.png" for which in ("reference", "quantized")]
    pictures |= dict(zip(paths, (image, other), strict=True))
    return PictureQuality(
        prompt=request.prompt,
        seed=request.seed or 0,
        latents_snr_db=snr_db(wanted, got),
        psnr_db=psnr_db(image, other, PEAK),
        ssim=ssim(image, other),
        gmsd=gmsd(image, other),
        reference=paths[0],
        quantized=paths[1],
    )


def _draw(model: LoadedModel, request: ImageRequest) -> tuple[Array, Picture]:
    """The final latents and the picture."""
    latents: list[Array] = []

    def seen(call: Call, outputs: Outputs) -> Outputs:
        if call.submodel == "vae_decoder":
            latents.append(np.array(call.inputs["latents"]))
        return outputs

    ran = _run(model, request, lambda pipeline: _answering(pipeline, seen))
    return latents[-1], ran.one(ImageReady).image


@dataclass
class _Decoding:
    """The decoder calls of one answer. With `forced`, the pipeline is told that each of these tokens was the likeliest.

    `prompt` is the prompt's length in tokens where it is known beforehand.
    """

    forced: Sequence[int] = ()
    prompt: int = 0
    calls: list[tuple[Call, Outputs]] = field(default_factory=list)

    def __call__(self, call: Call, outputs: Outputs) -> Outputs:
        if call.slot is None:
            return outputs
        if not np.isfinite(outputs["logits"]).all():
            raise EngineError(
                f"{call.submodel} gave NaN or infinite logits, expected finite ones: verify the bundle, or build with "
                "a higher precision"
            )
        copied = replace(call, inputs={name: np.array(array) for name, array in call.inputs.items()})
        self.calls.append((copied, dict(outputs)))
        place = _length(call) - self.prompt
        if not self.forced or place < 0:
            return outputs
        certain = np.full_like(outputs["logits"], -1)
        certain[..., self.forced[place]] = 1
        return {**outputs, "logits": certain}

    def logits(self, prompt: int) -> NDArray[np.float32]:
        """The logits [tokens, vocab] that each token of the answer was chosen from."""
        return np.stack(
            [
                np.asarray(outputs["logits"][0, -1], np.float32)
                for call, outputs in self.calls
                if _length(call) >= prompt
            ]
        )


def _length(call: Call) -> int:
    """Positions that the decoder holds after a call."""
    return int(call.inputs["attention_mask"].shape[1])


def _answer(
    i: int,
    request: ChatRequest,
    quantized: LoadedModel,
    reference: LoadedModel,
    pictures: Pictures,
    compared: Mapping[str, _Compared],
) -> AnswerQuality:
    """Ask both models one question, and the quantized one again on the reference's tokens where it chose others."""
    wanted, free = _Decoding(), _Decoding()
    first, second = (
        _run(model, request, lambda pipeline, seen=seen: _answering(pipeline, seen))  # type: ignore[misc]
        for model, seen in ((reference, wanted), (quantized, free))
    )
    prompt = first.one(Finished).prompt_tokens
    logits, others = wanted.logits(prompt), free.logits(prompt)
    tokens, chosen = ([int(token) for token in one.argmax(axis=1)] for one in (logits, others))
    if chosen != tokens:
        forced = _Decoding(tokens, prompt)
        _run(quantized, request, lambda pipeline: _answering(pipeline, forced))
        others = forced.logits(prompt)
    _replay(wanted.calls, quantized, compared)
    shown = request.images
    path = f"{FOLDER}/question-{i}.png" if shown else None
    if path:
        pictures[path] = decoded(shown[0])
    return AnswerQuality(
        question=" ".join(part for part in request.messages[-1].content if isinstance(part, str)),
        picture=path,
        reference=first.text.strip(),
        quantized=second.text.strip(),
        tokens=len(tokens),
        token_agreement=token_agreement(tokens, chosen),
        next_token_agreement=token_agreement(tokens, [int(token) for token in others.argmax(axis=1)]),
        kl_divergence=kl_divergence(logits, others),
        reference_perplexity=perplexity(logits, tokens),
        quantized_perplexity=perplexity(others, tokens),
    )


def _replay(calls: Iterable[tuple[Call, Outputs]], quantized: LoadedModel, compared: Mapping[str, _Compared]) -> None:
    """Give the quantized submodels that keep states the calls the reference's got, in the same order, in slots of their
    own.
    """
    slots: dict[int, Slot] = {}
    for call, outputs in calls:
        slot = slots.setdefault(id(call.slot), Slot())
        compared[call.submodel].add(call.submodel, outputs, run_call(quantized.engines, replace(call, slot=slot)))


def _task(quantized: LoadedModel, reference: LoadedModel, cases: int) -> TaskQuality | None:
    """Held-out cases, the first of those that `enginecast score` asks, for a source that was trained for them."""
    name = reference.bundle.manifest.source.name
    if name not in TASKS or not cases:
        return None
    judged = [right(model, cases) for model in (reference, quantized)]
    counts = [0, 0]
    for _ in each("case", range(cases)):
        counts = [count + next(done) for count, done in zip(counts, judged, strict=True)]
    return TaskQuality(
        task=f"held-out {TASKS[name]}", cases=cases, reference_right=counts[0], quantized_right=counts[1]
    )
