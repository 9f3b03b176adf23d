"""Answers of a given form: every one is a value of its schema, or matches its expression."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from runtime import limits
from runtime.errors import InvalidInput, MissingDependency
from runtime.language import constraint
from runtime.language.answering import Choice
from runtime.language.constraint import Constraint, Constraints
from runtime.language.grammar import Grammar
from runtime.language.sampling import Bounds, Rules, Sampling

SPECIALS = ["<unk>", "<s>", "</s>", "<image>"]
END, VOCABULARY = 2, 300
KEYWORDS = """type properties items anyOf oneOf allOf enum const required additionalProperties minItems maxItems
    minLength maxLength pattern format minimum maximum multipleOf prefixItems $ref $defs patternProperties not if
    """.split()
ANY = Sampling(temperature=1)


def byte_level(*merges: tuple[str, str]) -> Tokenizer:
    """A token for each byte, one for each merge."""
    names = [*SPECIALS, *sorted(pre_tokenizers.ByteLevel.alphabet()), *("".join(pair) for pair in merges)]
    tokenizer = Tokenizer(models.BPE(vocab={name: i for i, name in enumerate(names)}, merges=list(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in SPECIALS])
    return tokenizer


TOKENIZER = byte_level(('"', ":"), ("{", '"'), ("t", "r"), ("tr", "ue"), ("u", "e"), ("Ġ", '"'), ("}", "}"), ("<", "i"))
CONSTRAINTS = Constraints(TOKENIZER, VOCABULARY, (END,))


def drawn(grammar: Grammar, seed: int, sampling: Sampling = ANY, longest: int = 400) -> Any:
    """The text that random logits give, and whether it is complete."""
    rng = np.random.default_rng(seed)
    choice = Choice(sampling, Bounds(0, longest, (END,)), rng, CONSTRAINTS.open(grammar))
    tokens: list[int] = []
    while not choice.complete and END not in tokens and len(tokens) < longest:
        tokens.append(choice.token(rng.normal(0, 3, VOCABULARY).astype(np.float32), tokens))
    return TOKENIZER.decode(tokens), choice.complete or END in tokens


def following(constraint: Constraint, count: int = VOCABULARY) -> set[int]:
    """The tokens that may follow."""
    return set(np.flatnonzero(constraint.most(count) > 0).tolist())


def leaf() -> st.SearchStrategy[dict[str, Any]]:
    return st.sampled_from(
        [
            {"type": "boolean"},
            {"type": "null"},
            {"enum": ["red", "green", 3, None, {"a": [1]}]},
            {"const": 'say "é"\n'},
            {"type": "integer", "minimum": -5, "maximum": 120},
            {"type": "string", "maxLength": 4},
            {"type": "string", "pattern": "^[a-c]{2,3}$"},
        ]
    )


def nested(inner: st.SearchStrategy[dict[str, Any]]) -> st.SearchStrategy[dict[str, Any]]:
    arrays = st.builds(lambda of, most: {"type": "array", "items": of, "maxItems": most}, inner, st.integers(0, 3))
    names = st.sampled_from(["a", "b", "círcle", 'q"'])
    objects = st.builds(
        lambda of, required: {
            "type": "object", "properties": of, "required": sorted(of)[:required], "additionalProperties": False,
        },
        st.dictionaries(names, inner, max_size=3), st.integers(0, 3),
    )  # fmt: skip
    return arrays | objects | st.builds(lambda a, b: {"anyOf": [a, b]}, inner, inner)


@settings(max_examples=60, derandomize=True)
@given(st.recursive(leaf(), nested, max_leaves=5), st.integers(0, 2**16), st.sampled_from([0.0, 0.7, 1.5]))
def test_every_answer_is_a_value_of_its_schema(schema: dict[str, Any], seed: int, temperature: float) -> None:
    text, complete = drawn(Grammar.schema(schema), seed, Sampling(temperature=temperature), 2000)
    assert complete
    assert_valid(json.loads(text), schema)


def assert_valid(value: Any, schema: dict[str, Any]) -> None:
    Draft202012Validator.check_schema(schema)
    assert not list(Draft202012Validator(schema).iter_errors(value)), (value, schema)


@pytest.mark.parametrize("seed", range(4))
def test_a_json_object_is_one_as_far_as_it_goes(seed: int) -> None:
    text, complete = drawn(Grammar.json(), seed)
    assert text.startswith("{")
    if complete:
        assert isinstance(json.loads(text), dict)


@pytest.mark.parametrize("pattern", ["(red|gre+n)( [0-9]{2})?", "é{2,3}!", "<i*", "[^a]{5}x"])
@pytest.mark.parametrize("seed", range(3))
def test_every_answer_matches_its_expression(pattern: str, seed: int) -> None:
    text, complete = drawn(Grammar.regex(pattern), seed, longest=60)
    assert not complete or re.fullmatch(pattern, text)
    assert complete or len(text) > 10


@pytest.mark.parametrize("name", SPECIALS)
def test_special_tokens_are_no_text(name: str) -> None:
    """A form that has the name of one is written letter by letter, also where nothing else may follow."""
    found = CONSTRAINTS.open(Grammar.regex(f"a{name}"))
    found.push(TOKENIZER.token_to_id("a"))
    allowed = {TOKENIZER.id_to_token(one) for one in following(found)}
    assert allowed == {"<", "<i"} & {name[:1], name[:2]}
    text, complete = drawn(Grammar.schema({"const": name}), 0)
    assert complete and json.loads(text) == name


@pytest.mark.parametrize("pattern", ["a/b", "a\\/b\\.", 'x"y\n', "%json", "start: y", "a\n\nstart: b", "\\\\", "/"])
def test_no_expression_is_more_than_one(pattern: str) -> None:
    """The library's own syntax begins nowhere in it."""
    text, complete = drawn(Grammar.regex(pattern), 0)
    assert complete and re.fullmatch(pattern, text)


def test_blanks_between_values_end() -> None:
    """A model that loves blanks still comes to an end."""
    found, blank = CONSTRAINTS.open(Grammar.json()), TOKENIZER.token_to_id("Ġ")
    found.push(TOKENIZER.token_to_id("{"))
    count = 0
    while blank in following(found):
        found.push(blank)
        count += 1
    assert count == 32


def test_copies_go_on_by_themselves() -> None:
    first = CONSTRAINTS.open(Grammar.regex("ab|ba"))
    second = first.fork()
    a, b = map(TOKENIZER.token_to_id, "ab")
    first.push(a)
    assert following(first) == {b}
    assert following(second) == {a, b}
    first.push(b)
    assert first.complete and not second.complete


@pytest.mark.parametrize("ends", [(), (2,), (2, 3)])
@pytest.mark.parametrize("count", [VOCABULARY, 280, 350])
def test_any_number_of_logits_and_end_tokens(ends: Sequence[int], count: int) -> None:
    found = Constraints(TOKENIZER, count, ends).open(Grammar.regex("a*"))
    assert found.most(count).shape == (count,) and set(found.most(count)) == {np.inf, -np.inf}
    assert following(found, count) == {*ends, TOKENIZER.token_to_id("a")}


def test_an_end_that_a_length_forces_is_no_end_of_a_grammar() -> None:
    """A rule that raises a score does not make a token allowed."""
    forced = Sampling(rules=Rules(suppress_tokens=(TOKENIZER.token_to_id("b"),), remove_invalid_values=True))
    choice = Choice(forced, Bounds(0, 9, (END,)), np.random.default_rng(0), CONSTRAINTS.open(Grammar.regex("[a-c]")))
    assert choice.token(np.arange(VOCABULARY, 0, -1).astype(np.float32), []) == TOKENIZER.token_to_id("a")


@pytest.mark.parametrize(
    ("grammar", "reason"),
    [
        (Grammar.schema({"type": "objekt"}), "Invalid type: objekt"),
        (Grammar.schema({"if": {}, "uniqueItems": True}), "Unimplemented keys"),
        (Grammar.schema({"type": "string", "pattern": "("}), "unclosed group"),
        (Grammar.schema({"$ref": "https://example.com/schema"}), "does not fetch"),
        (Grammar.schema({"$ref": "file:///etc/passwd"}), "does not fetch"),
        (Grammar.schema({"allOf": [False]}), "Unsatisfiable"),
        (Grammar.regex("(a"), "unclosed group"),
        (Grammar.regex("(?=a)b"), "look-around"),
        (Grammar.schema({"oneOf": [{"type": "string"}, {"type": "string", "maxLength": 3}]}), "oneOf"),
        (
            Grammar.schema({"allOf": [{"anyOf": [{"pattern": "a" * i * j} for i in range(8)]} for j in range(8)]}),
            "too large",
        ),
    ],
)
def test_what_cannot_be_followed_is_refused(grammar: Grammar, reason: str) -> None:
    with pytest.raises(InvalidInput, match=reason) as caught:
        CONSTRAINTS.open(grammar)
    assert caught.value.field == "grammar" and len(str(caught.value)) < 400
    assert "\n" not in str(caught.value) and "%" not in str(caught.value)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: Grammar.schema("[1"), "cannot be read as JSON"),
        (lambda: Grammar.schema("true"), "expected a JSON object"),
        (lambda: Grammar.schema("[" * 50_000), "cannot be read as JSON"),
        (lambda: Grammar.schema({"x-guidance": {"lenient": True}}), "'x-guidance'"),
        (lambda: Grammar.schema({"a": {1, 2}}), "not JSON serializable"),
        (lambda: Grammar.schema('{"a":' * 65 + "1" + "}" * 65), "65 objects and arrays"),
        (lambda: Grammar.regex("a" * 65_537), "65,537 characters"),
        (lambda: Grammar.regex(""), "is empty"),
        (lambda: Grammar.regex("\ud800"), "surrogate"),
        (lambda: Grammar("lark", "start: x"), "is a 'lark'"),  # type: ignore[arg-type]
    ],
)
def test_what_is_no_grammar_is_refused_where_it_is_made(make: Any, reason: str) -> None:
    with pytest.raises(InvalidInput, match=reason) as caught:
        make()
    assert caught.value.field == "grammar"


def test_alternatives_that_exclude_each_other_are_followed() -> None:
    one = {"type": "object", "properties": {"is": {"const": "a"}}, "required": ["is"], "additionalProperties": False}
    schema = {"oneOf": [one, {"type": "array", "maxItems": 0}]}
    for seed in range(3):
        text, complete = drawn(Grammar.schema(schema), seed)
        assert complete
        assert_valid(json.loads(text), schema)


def test_what_becomes_too_complex_on_the_way_is_an_error_of_the_grammar() -> None:
    many = {"anyOf": [{"type": "object", "properties": {f"k{i}": {"type": "string"}}} for i in range(900)]}
    with pytest.raises(InvalidInput, match="any further, it is too complex: Parser Error: Current row"):
        drawn(Grammar.schema(many), 0)


def test_a_text_that_the_vocabulary_cannot_write_is_refused() -> None:
    letters = Tokenizer(models.BPE(vocab={"a": 0, "b": 1, "</s>": 2}, merges=[]))
    letters.decoder = decoders.ByteLevel()
    found = Constraints(letters, 3, (2,)).open(Grammar.regex("a[x-z]"))
    found.push(0)
    with pytest.raises(InvalidInput, match="no token for what comes next"):
        found.most(3)


def test_tokenizers_that_the_library_does_not_read_are_named() -> None:
    unigram = Tokenizer(models.Unigram([("<unk>", 0.0), ("▁a", -1.0)], 0, False))
    unigram.decoder = decoders.Metaspace()
    with pytest.raises(InvalidInput, match="whose tokenizer llguidance does not read"):
        Constraints(unigram, 2, (0,)).open(Grammar.json())


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 3)
    | st.sampled_from([1e300, 0.1, "string", "object", "^a+$", "#", "("]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(KEYWORDS), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=150, derandomize=True)
@given(st.dictionaries(st.sampled_from(KEYWORDS), JSON, min_size=1, max_size=4), st.integers(0, 9))
def test_whatever_is_sent_as_a_schema_is_followed_or_refused(schema: dict[str, Any], seed: int) -> None:
    try:
        text, complete = drawn(Grammar.schema(schema), seed, longest=40)
    except InvalidInput as error:
        assert error.field == "grammar"
    else:
        assert not complete or not list(Draft202012Validator(schema).iter_errors(json.loads(text)))


@settings(max_examples=150, derandomize=True)
@given(
    st.lists(st.sampled_from([*'ab()[]*+?|.^$&~/%{}<\n"\\', "{1,3}", "\\d", "\\p{L}", "(?i)"]), min_size=1, max_size=9)
)
def test_whatever_is_sent_as_an_expression_is_followed_or_refused(parts: list[str]) -> None:
    try:
        drawn(Grammar.regex("".join(parts)), 0, longest=20)
    except InvalidInput as error:
        assert error.field == "grammar"


def test_the_vocabulary_is_read_before_the_first_request(monkeypatch: pytest.MonkeyPatch) -> None:
    found = Constraints(TOKENIZER, VOCABULARY, (END,))
    found.prepare()
    monkeypatch.setattr(found, "_tokenizer", None)
    found.open(Grammar.json())
    monkeypatch.setattr(constraint, "require", missing)
    Constraints(TOKENIZER, VOCABULARY, (END,)).prepare()


def missing(package: str, extra: str) -> None:
    raise MissingDependency(package, extra)


def test_without_the_library_its_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constraint, "require", missing)
    with pytest.raises(MissingDependency, match=r"enginecast\[constrained\]"):
        CONSTRAINTS.open(Grammar.json())


def test_the_limits_are_the_librarys() -> None:
    """A schema of many symbols is refused before any token."""
    many = {"anyOf": [{"type": "array", "prefixItems": [{"const": f"{i}{j}"} for j in range(40)]} for i in range(40)]}
    before = limits.GRAMMAR_SYMBOLS
    CONSTRAINTS.open(Grammar.schema(many))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(limits, "GRAMMAR_SYMBOLS", limits.GRAMMAR_DEPTH)
        with pytest.raises(InvalidInput, match="grammar"):
            CONSTRAINTS.open(Grammar.schema(many))
    assert before is limits.GRAMMAR_SYMBOLS
