"""Recipes: every shipped one loads, overrides mean what they say, and all mistakes are named at once."""

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from dl7cli import recipe
from dl7cli.errors import UserError
from dl7cli.training.optimisation import learning_rate


@pytest.mark.parametrize("name", recipe.shipped())
def test_every_shipped_recipe_loads_with_its_fallback_and_says_what_it_is(name: str) -> None:
    resolved = recipe.resolve(name)
    assert resolved.recipe.name == name
    if name in ("resnet", "seq2seq"):
        assert resolved.fallback is not None
        assert resolved.fallback().data.source.startswith("builtin:")
    else:
        assert resolved.fallback is None, "what reproduces a paper's figure does so on the paper's data alone"
    header = recipe.header(name)
    assert f"dl7 train {name}" in " ".join(header)
    assert len(header) >= 4


def test_the_two_recipes_of_the_first_commands_are_shipped() -> None:
    assert {"resnet", "seq2seq"} <= set(recipe.shipped())


def test_every_header_has_a_title_of_one_line_a_command_and_what_was_measured() -> None:
    for name in recipe.shipped():
        title, blank, *rest = recipe.header(name)
        assert title.endswith(".")
        assert len(title) <= 110
        assert not blank
        assert f"Command:  dl7 train {name}" in rest
        assert any(line.startswith("Measured: ") for line in rest)


def test_the_written_recipe_reads_back_to_the_same(tmp_path: Path) -> None:
    for name in recipe.shipped():
        first = recipe.resolve(name, ["training.epochs=3"]).recipe
        path = tmp_path / f"{name}.toml"
        path.write_text(recipe.to_toml(first), encoding="utf-8")
        assert recipe.resolve(str(path)).recipe == first
        assert recipe.from_document(recipe.to_document(first), origin="test") == first


@pytest.mark.parametrize("name", recipe.shipped())
def test_every_key_of_every_recipe_is_explained(name: str) -> None:
    found = recipe.resolve(name).recipe
    keys = {"name", *(f"{table}.{key}" for table in found.model_fields_set - {"name"} for key in _keys(found, table))}
    explained = recipe.explanations(found)
    assert explained.keys() >= keys
    assert [key for key, text in explained.items() if not text or text.startswith("[")] == []


def _keys(found: recipe.Recipe, table: str) -> list[str]:
    return list(getattr(found, table).model_dump())


def test_choices_and_bounds_of_keys_are_told() -> None:
    explained = recipe.explanations(recipe.resolve("resnet").recipe)
    ends = {
        "optim.name": "[sgd | adamw | muon]",
        "model.residual": "[true | false]",
        "data.image_size": "[from 8 to 512]",  # which may also be left out
        "training.ema_decay": "[from 0 below 1]",
        "model.survival": "[above 0 to 1]",
        "data.source": "`builtin:shapes`.",
        "optim.milestones": "He et al. 2015.",
    }
    for key, end in ends.items():
        assert explained[key].endswith(end), explained[key]
    assert explained["data.flip"].startswith("How training images are mirrored; `alternating`:")


def test_overrides_win_over_flags_and_the_file() -> None:
    changed = recipe.resolve("resnet", ["model.depth=32", "training.seed=9"], seed=4, data="builtin:shapes").recipe
    assert changed.model.depth == 32  # type: ignore[union-attr]
    assert changed.training.seed == 9
    assert changed.data.source == "builtin:shapes"
    assert recipe.resolve("resnet", seed=4).recipe.training.seed == 4


def test_there_is_a_fallback_only_where_the_data_was_not_asked_for() -> None:
    assert recipe.resolve("seq2seq").fallback is not None
    assert recipe.resolve("seq2seq", data="some/data").fallback is None
    assert recipe.resolve("seq2seq", ["data.source=some/data"]).fallback is None


def test_the_fallback_is_the_same_recipe_as_asking_for_the_built_in_set() -> None:
    for name in ("resnet", "seq2seq"):
        stand_in = standing_in(name, "training.seed=7")
        assert recipe.resolve(name, ["training.seed=7"], data=stand_in.data.source).recipe == stand_in


def test_overrides_win_over_the_fallback() -> None:
    assert standing_in("seq2seq", "training.epochs=17").training.epochs == 17


def test_overrides_that_only_the_fallback_does_not_take_are_told_where_it_is_used() -> None:
    """The built-in set's model has an encoder of other width, which dot products would have to fit."""
    resolved = recipe.resolve("seq2seq", ["model.attention=dot", "model.decoder_width=512"])
    assert resolved.recipe.model.decoder_width == 512  # type: ignore[union-attr]
    assert resolved.fallback is not None
    with pytest.raises(UserError, match=r"recipe `seq2seq` with its keys for `builtin:phrases` has one mistake"):
        resolved.fallback()


def test_a_mistake_in_a_files_fallback_is_told_at_once(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(
        recipe.to_toml(recipe.resolve("resnet").recipe) + '[fallback]\n"model.dept" = 8\n"data.source" = "x"\n'
    )
    with pytest.raises(UserError, match=r"model\.dept"):
        recipe.resolve(str(file))


def standing_in(name: str, *overrides: str) -> recipe.Recipe:
    fallback = recipe.resolve(name, overrides).fallback
    assert fallback is not None
    return fallback()


def test_all_mistakes_are_reported_at_once_with_their_keys() -> None:
    wrong = ["optim.learnin_rate=1", "model.depth=21", "training.epochs=0", "no equals sign", "nonsense.key=1"]
    with pytest.raises(UserError) as caught:
        recipe.resolve("resnet", wrong)
    text = caught.value.message
    assert "5 mistakes" in text
    assert "`optim.learnin_rate` (did you mean `optim.learning_rate`?)" in text
    assert "`model.depth` is `21`" in text
    assert "the nearest is 20" in text
    assert "`training.epochs` is `0`" in text
    assert "`--set no equals sign` has no `=`" in text
    assert "`nonsense`" in text


@pytest.mark.parametrize(
    ("overrides", "seen"),
    [
        (["model.kind=resne"], "did you mean `resnet`?"),
        (["data=3"], "`data` is `3`"),
        (["data.source.x=3"], "leads through a key that holds a value"),
        (["training.epochs=ten"], '`training.epochs` is `"ten"`'),
        (["training.epochs=1.5"], "`training.epochs` is `1.5`"),
        (["optim.learning_rate=nan"], "`optim.learning_rate`"),
        (["optim.learning_rate=0"], "`optim.learning_rate` is `0`"),
        (["optim.name=adam"], "`optim.name`"),
        (["model.encoder_width=64"], "unknown key `model.encoder_width`"),
        (["model.depth=18"], "the nearest is 20; ResNet-18 and its like have `model.stages = 4`"),
        (["model.learned_beta=true"], 'it needs `model.activation = "swish"`'),
        (["model.beta=2.0", "model.activation=maxout"], 'it needs `model.activation = "swish"`'),
        (["model.pieces=3"], 'it needs `model.activation = "maxout"`'),
        (["a..b=1"], "is not a key"),
        (["=1"], "is not a key"),
    ],
)
def test_a_mistake_names_its_key(overrides: list[str], seen: str) -> None:
    with pytest.raises(UserError) as caught:
        recipe.resolve("resnet", overrides)
    assert seen in caught.value.message
    assert caught.value.hint


def test_what_the_activation_has_use_for_is_taken() -> None:
    recipe.resolve("resnet", ["model.activation=maxout", "model.pieces=3", "model.beta=1.0"])
    recipe.resolve("resnet", ["model.activation=swish", "model.beta=2.0", "model.learned_beta=true"])
    with pytest.raises(UserError) as caught:
        recipe.resolve("resnet", ["model.stages=4", "model.depth=101"])
    assert "ResNet-18 and its like" not in caught.value.message


def test_the_nearest_key_is_one_of_the_chosen_model() -> None:
    for name, key, suggestion in (
        ("seq2seq", "model.width", ""),  # of the Transformer
        ("transformer-tiny", "model.widht", " (did you mean `model.width`?)"),
        ("transformer-tiny", "model.encoder_layer", " (did you mean `model.encoder_layers`?)"),
        ("resnet", "model.encoder_layers", ""),
    ):
        with pytest.raises(UserError) as caught:
            recipe.resolve(name, [f"{key}=32"])
        seen = caught.value.message.splitlines()[1].strip()
        assert seen.startswith(f"unknown key `{key}`")
        assert f"`{key}`?" not in seen
        assert not suggestion or seen.endswith(suggestion)


@pytest.mark.parametrize(
    ("overrides", "seen"),
    [
        (["encoder_direction=forward", "encoder_stack=alternating"], 'need `model.encoder_direction = "both"`'),
        (["attention=dot", "decoder_width=100"], "need `model.decoder_width = 512`"),
        (["attention=dot", "encoder_direction=forward", "decoder_width=100"], "need `model.decoder_width = 256`"),
        (["attention=multihead", "heads=6"], "`model.heads` is `6`: the width of the encoder's outputs, 512, must be"),
        (["attention=none", "encoder_layers=2"], "`model.decoder_layers` is `1`: without attention it must be"),
        (["attention=none", "decoder=luong", "input_feeding=true"], "`model.input_feeding`"),
        (["input_feeding=true"], 'it needs attention and `model.decoder = "luong"`'),
        (["readout_width=100"], 'needs `model.tied = "none"`'),
        (["coverage=true"], '`model.coverage` is `true`: it needs `model.attention = "additive"`'),
        (["attention=none", "copying=true"], "`model.copying` is `true`"),
    ],
)
def test_keys_of_the_recurrent_model_that_do_not_go_together_are_named(overrides: list[str], seen: str) -> None:
    with pytest.raises(UserError) as caught:
        recipe.resolve("seq2seq", [f"model.{override}" for override in overrides])
    assert seen in caught.value.message
    assert "mistakes" not in caught.value.message


@pytest.mark.parametrize(
    ("overrides", "seen"),
    [
        (["data.joint=false"], '`model`: a vocabulary for each language needs `model.tied = "output"` or `"none"`'),
        (
            ["data.joint=false", "model.tied=none", "model.copying=true"],
            "`model`: copying needs one vocabulary for both languages: `data.joint = true`",
        ),
        (["training.coverage_weight=1"], "`training`: `training.coverage_weight` needs `model.coverage = true`"),
        (
            ["training.r_drop=5", "model.dropout=0"],
            "`training`: `training.r_drop` compares two draws of dropout, and `model.dropout` is 0",
        ),
        (
            ["model.attention=none", "decoding.coverage_penalty=0.2"],
            "`decoding`: `decoding.coverage_penalty` is of attention, and `model.attention` is none",
        ),
    ],
)
def test_keys_of_two_sections_that_do_not_go_together_are_named(overrides: list[str], seen: str) -> None:
    with pytest.raises(UserError) as caught:
        recipe.resolve("seq2seq", overrides)
    assert caught.value.message == f"recipe `seq2seq` has one mistake:\n  {seen}"


def test_keys_of_two_sections_that_go_together_are_taken() -> None:
    keys = ["training.coverage_weight=1", "model.coverage=true", "model.attention=concat"]
    assert recipe.resolve("seq2seq", keys).recipe.training.coverage_weight == 1  # type: ignore[union-attr]
    keys = ["data.joint=false", "model.tied=output", "decoding.coverage_penalty=0.2"]
    assert recipe.resolve("seq2seq", keys).recipe.decoding.coverage_penalty == 0.2  # type: ignore[union-attr]


def test_no_length_normalisation_is_a_penalty_of_0_and_nothing_else() -> None:
    """So that no length penalty is without effect."""
    with pytest.raises(UserError, match=r"`decoding\.length_normalisation` is `\"none\"`"):
        recipe.resolve("seq2seq", ["decoding.length_normalisation=none"])


def test_an_unknown_recipe_suggests_the_nearest() -> None:
    with pytest.raises(UserError, match="did you mean `resnet`"):
        recipe.resolve("resent")
    with pytest.raises(UserError, match=r"there is no recipe file `missing\.toml`"):
        recipe.resolve("missing.toml")


def test_a_broken_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "broken.toml"
    path.write_text("[model\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"broken\.toml` is not a TOML file"):
        recipe.resolve(str(path))
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match=r"broken\.toml` is not a TOML file"):
        recipe.resolve(str(path))


def test_a_comment_may_have_dots_without_number(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(f"  # {'.' * 200}\n" + recipe.find("resnet").read_text(encoding="utf-8"), encoding="utf-8")
    assert recipe.resolve(str(path)).recipe == recipe.resolve("resnet").recipe.model_copy(update={"name": "mine"})


def test_a_recipe_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="frozen"):
        recipe.resolve("resnet").recipe.training.epochs = 2  # type: ignore[misc]


@given(st.text(alphabet=st.characters(codec="utf-8"), max_size=40))
def test_an_override_splits_at_the_first_equals_sign_and_any_text_survives(text: str) -> None:
    path, value = recipe.parse_override(f"data.source={text}")
    assert path == ["data", "source"]
    # Either the text itself or the one value that TOML reads there.
    if isinstance(value, str) and value != text.strip():
        assert tomllib.loads(f"v = {text.strip()}")["v"] == value


def _same(left: Any, right: Any) -> bool:
    return type(left) is type(right) and left == right


@given(
    st.one_of(
        st.booleans(),
        st.integers(-(2**40), 2**40),
        st.floats(allow_nan=False, allow_infinity=False),
        st.text(alphabet="abcxyzÄß= .#'[]", min_size=1, max_size=20).map(lambda text: f"x{text}x"),
    )
)
def test_values_keep_their_type(value: Any) -> None:
    written = str(value).lower() if isinstance(value, bool) else repr(value) if isinstance(value, float) else value
    assert _same(recipe.parse_override(f"a.b={written}")[1], value)


@given(st.lists(st.from_regex(r"[a-z_]{1,8}", fullmatch=True), min_size=1, max_size=4))
def test_key_paths_come_back(names: list[str]) -> None:
    assert recipe.parse_override(".".join(names) + "=1") == (names, 1)


def test_flags_that_were_given_change_how_a_run_searches() -> None:
    decoding = recipe.Decoding(beam=7, length_penalty=1.0)
    changed = decoding.updated(beam=2, length_penalty=None, method="sample", top_k=None)
    assert changed == recipe.Decoding(beam=2, length_penalty=1.0, method="sample")
    assert decoding.updated() == decoding
    assert decoding.updated(beam=None, min_length=0).min_length == 0
    for wrong in ({"beam": 0}, {"top_p": 0.0}, {"temperature": 0.0}, {"length_normalisation": "mean"}, {"width": 3}):
        with pytest.raises(ValidationError):
            decoding.updated(**wrong)


# The papers' protocols


@pytest.mark.parametrize("depth", [20, 56, 110])
def test_the_recipes_of_he_et_al_have_their_protocol(depth: int) -> None:
    """He et al. 2015, §4.2: 45,000 images in batches of 128, 64,000 steps, a tenth of the rate at 32,000 and 48,000."""
    paper = recipe.resolve(f"resnet{depth}-paper").recipe
    training, optim = paper.training, paper.optim
    steps = training.epochs * -(-45_000 // training.batch_size)
    assert (training.batch_size, steps // 1000) == (128, 64)
    assert [learning_rate(optim, step, steps) for step in (31_900, 32_100, 47_900, 48_100, steps - 1)] == pytest.approx(
        [0.1, 0.01, 0.01, 0.001, 0.001]
    )
    # "we use 0.01 to warm up the training until the training error is below 80% (about 400 iterations)" for 110 layers.
    assert round(optim.warmup * steps) == pytest.approx(400 if depth == 110 else 0, abs=5)
    assert (optim.name, optim.momentum, optim.weight_decay) == ("sgd", 0.9, 1e-4)
    assert (paper.data.crop_padding, paper.data.flip, paper.data.validation_fraction) == (4, "random", 0.1)
    assert (paper.evaluation.flip, training.ema_decay, training.label_smoothing) == (False, 0, 0)


def test_plain_and_residual_recipes_differ_in_the_shortcuts_alone() -> None:
    for depth in (20, 56):
        both = (recipe.resolve(f"{kind}{depth}-paper").recipe for kind in ("resnet", "plain"))
        assert recipe.differences(*both) == {"model.residual": [True, False]}


def test_a_key_that_would_do_nothing_is_refused_where_it_is_set() -> None:
    for name, change, needed in (
        ("resnet", "optim.milestones=[0.5]", '`optim.milestones` does nothing without `optim.schedule = "step"`'),
        (
            "resnet",
            "model.match=parameters",
            '`model.match` does nothing without `model.activation = "maxout" or "glu"`',
        ),
        ("seq2seq", "model.heads=2", '`model.heads` does nothing without `model.attention = "multihead"`'),
        ("seq2seq", "decoding.top_k=2", '`decoding.top_k` does nothing without `decoding.method = "sample"`'),
        ("plain20-paper", "model.shortcut=B", "`model.shortcut` does nothing without `model.residual`"),
        ("seq2seq-sutskever", "model.decoder=luong", "`model.decoder` does nothing without `model.attention`"),
        ("resnet", "training.small_part=0.6", "`training.small_part` does nothing without `training.small_size`"),
    ):
        with pytest.raises(UserError, match=re.escape(needed)):
            recipe.resolve(name, [change])
    with pytest.raises(UserError, match=r"`data\.crop_fill` does nothing without `data\.crop_padding`"):
        recipe.resolve("resnet", ["data.crop_padding=0", "data.crop_fill=reflect"])
    assert recipe.resolve("seq2seq", ["decoding.top_k=2", "decoding.method=sample"]).recipe.decoding.top_k == 2
    # A recipe has it for when it is wanted, as its own rate of Muon's other weights.
    assert recipe.resolve("resnet", ["optim.name=sgd"]).recipe.optim.other_learning_rate is not None


def test_data_that_have_been_moved_must_have_a_name_that_can_be_written_down() -> None:
    whole = recipe.resolve("resnet").recipe
    assert recipe.resumed(whole, [], data="elsewhere").data.source == "elsewhere"
    with pytest.raises(UserError, match=r"`data\.source`"):
        recipe.resumed(whole, [], data="photos\udcff")


def test_a_flag_and_a_key_must_not_say_different_things() -> None:
    whole = recipe.resolve("seq2seq").recipe
    assert isinstance(whole, recipe.TranslationRecipe)
    assert recipe.decoding(whole, ["decoding.beam=3"], beam=3).beam == recipe.decoding(whole, beam=3).beam == 3
    for flags, change, told in (
        ({"beam": 3}, "decoding.beam=5", "`decoding.beam` is `5`, and by a flag `3`"),
        ({"method": "sample", "seed": 1}, "decoding.seed=2", "`decoding.seed` is `2`, and by a flag `1`"),
        ({"beam": 1, "method": "beam"}, "decoding.method=sample", '`decoding.method` is `"sample"`, and by a flag'),
    ):
        with pytest.raises(UserError, match=re.escape(told)):
            recipe.decoding(whole, [change], **flags)


def test_a_byte_order_mark_is_no_mistake(tmp_path: Path) -> None:
    text = recipe.find("resnet").read_text(encoding="utf-8")
    (tmp_path / "mine.toml").write_text(text, encoding="utf-8-sig")
    name = str(tmp_path / "mine.toml")
    assert recipe.alike(recipe.resolve(name).recipe, recipe.resolve("resnet").recipe)
    assert recipe.header(name) == recipe.header("resnet")
