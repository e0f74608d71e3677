"""The model card of a posterior, README.md beside its weights: Markdown with the Hub's metadata."""

from __future__ import annotations

import json

from bayeslayers.storage.card import Card


def model_card(card: Card) -> str:
    """Return the README.md of a posterior: the Hub's front matter, how to use it, how it was made."""
    from huggingface_hub import EvalResult, ModelCardData

    images = len(card.input_size) != 1
    results = [
        EvalResult(
            task_type="image-classification" if images else "tabular-classification",
            dataset_type=card.dataset.partition(" ")[0].lower(),
            dataset_name=card.dataset,
            metric_type=key,
            metric_value=card.metrics[key],
        )
        for key in ("accuracy", "nll", "ece")
        if card.dataset and key in card.metrics
    ]
    front = ModelCardData(
        license=card.license or None,
        library_name="bayeslayers",
        tags=["bayesian", "uncertainty", "variational-inference"],
        model_name=card.name,
        eval_results=results or None,
    )
    facts = {
        "network": f"`{card.builder}` {json.dumps(card.kwargs)}" if card.builder else "the author's own",
        "images": f"resized to {card.resize}, of which the middle is taken" if card.resize else "",
        "data": card.dataset,
        "optimiser": json.dumps(card.optimizer) if card.optimizer else "",
        "temperature": card.temperature,
        "trained by": f"`{card.recipe}`" if card.recipe else "",
    }
    lines = [f"- {key}: {value}" for key, value in facts.items() if value not in ("", None)]
    inputs = "images" if images else "x"
    how = "" if card.method == "sample" else f', method="{card.method}"'
    name = json.dumps(card.name, ensure_ascii=False)
    if card.builder:
        load = f"import bayeslayers as bl, zoo\n\nmodel = zoo.load({name})"
    else:
        load = f"import bayeslayers as bl\n\nmodel = ...  # the author's own network\nbl.load_posterior({name}, model)"
    return (
        f"---\n{front.to_yaml()}\n---\n\n# {card.name}\n\nA Gaussian posterior over the weights of a network: "
        f"means and precisions.\n\n```python\n{load}\n"
        f"prediction = bl.predict(model, {inputs}, num_samples=64{how})\n```\n\n"
        + "\n".join(lines)
        + f"\n\n{_metrics_table(card)}{card.notes}\n"
    )


def _metrics_table(card: Card) -> str:
    if not card.metrics:
        return ""
    other = str(card.baseline.get("optimizer", ""))
    header = f"| metric | this posterior | {other} |\n|---|---|---|\n" if other else "| metric | value |\n|---|---|\n"
    rows = [
        f"| {key} | {value:.6g} |" + (f" {card.baseline.get(key, '')} |" if other else "")
        for key, value in card.metrics.items()
    ]
    return header + "\n".join(rows) + "\n\n"
