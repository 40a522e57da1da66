"""What the cards of all fine-tuned models say alike."""

import yaml

from training.model_card import times


def training_section(facts: dict, trained_on: str) -> str:
    """Of any fine-tuning; `trained_on` is a volume, in words."""
    recipe = facts.get("recipe")
    if not isinstance(recipe, dict):
        return "## Training\n\nNothing is known of it: the model came without its record."
    train, count, crop = recipe["train"], facts.get("volumes"), times(recipe["views"]["crop_size"])
    volumes = f"{count} {trained_on}{'s' if count != 1 else ''}"
    start = f"from {facts['origin']}" if facts.get("origin") else "from random weights"
    return f"""## Training

Recipe `{recipe["name"]}`, {facts.get("step", "?")} of {train["steps"]} steps of {train["batch_size"]} crops of
{crop} voxels, drawn from {volumes}, {start}, on {facts.get("engine", "unknown hardware")}. Not trained on:
{facts.get("validation_subjects", 0)} subjects kept for validation, and those of `data.leave_out`.

<details><summary>The whole recipe</summary>

```yaml
{yaml.safe_dump(recipe, sort_keys=False).strip()}
```

</details>"""


def limits_section(facts: dict) -> str:
    told = facts.get("data_description") or "its author has not said which"
    return f"""## Intended use and limits

For research on volumes like those it was trained on: {told}. Not a medical device, and not evaluated for any clinical
decision."""


def licence_section(license: str | None) -> str:
    of_weights = "The licence of the weights is for their author to state, as their data allow."
    return f"""## Licence

The Python files are Apache-2.0 (LICENSE). {f"The weights: {license}." if license else of_weights}"""
