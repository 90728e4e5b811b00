"""Recipes: what is trained, as TOML files checked against a schema. Knows no torch and no data.

A recipe has five sections: `data`, `model`, `training`, `optim`, and `evaluation` or, for translation, `decoding`. A
sixth table of the file, `fallback`, holds the keys that change when the built-in set stands in for the recipe's data.
"""

from dl7cli.recipe.classification import ClassificationRecipe, FastResNetModel, ImageData, ResNetModel
from dl7cli.recipe.explaining import explanations
from dl7cli.recipe.files import (
    Recipe,
    alike,
    decoding,
    differences,
    find,
    folder,
    from_document,
    header,
    parse_override,
    read,
    resolve,
    resumed,
    shipped,
    to_document,
    to_toml,
    unset_keys,
    with_seed,
)
from dl7cli.recipe.section import Optim, Training
from dl7cli.recipe.translation import ConvS2SModel, Decoding, Seq2SeqModel, TransformerModel, TranslationRecipe
