"""The demo: write the headline of a docstring from its body, offline, with what every installation carries.

Pairs are harvested from the installed packages for training and from the standard library for testing; the teacher
is shipped (dqbart/assets). So a newcomer sees a real compression, with a score on text that neither teacher nor
student was trained on, before bringing any data.
"""

from pathlib import Path
from typing import Any

from dqbart.recipe import Recipe

TEACHER = Path(__file__).parent / "assets" / "docstring-teacher"
TEST_EXAMPLES = 500
SHOWN = 5
SETTINGS: dict[str, Any] = dict(
    epochs=0.45, batch_size=64, max_source_length=128, max_target_length=32, evaluations=2, dev_subset=100
)


def demo(output: Path, *, bits: str = "2-2-8", layers: str = "3-2", **changes: Any) -> dict[str, Any]:
    """Compress the shipped teacher into `output/model`, score both on the standard library's docstrings.

    `output/data` is harvested unless it is there already. `changes` go into the recipe. Returns the last line's
    values: sizes, dev and test scores.
    """
    from dqbart.pipeline import compress
    from dqbart.tasks.run import evaluate

    recipe = Recipe.from_dict(SETTINGS | {"bits": bits, "layers": layers} | changes)
    data = output / "data"
    if not all((data / f"{split}.jsonl").exists() for split in ("train", "validation", "test")):
        from dqbart.data.docstrings import write_docstrings

        write_docstrings(data)
    result = compress(TEACHER, data, recipe=recipe, output=output / "model")
    scores, outputs = {}, {}
    for who, folder in (("teacher", TEACHER), ("student", result.folder)):
        scores[who], outputs[who] = evaluate(str(folder), data, split="test", limit=TEST_EXAMPLES)
    for teacher_row, student_row in list(zip(outputs["teacher"], outputs["student"], strict=True))[:SHOWN]:
        print(f"body     {teacher_row['source'][:200]}")
        print(f"written  {teacher_row['reference']}")
        print(f"teacher  {teacher_row['output']}")
        print(f"student  {student_row['output']}\n")
    print(f"{scores['teacher'].n} docstrings of the standard library:")
    for who, score in scores.items():
        print(f"  {who}  {score}")
    sizes = result.report["sizes"]
    print(
        f"{bits}, {layers} layers: {sizes['file_bytes']:,} bytes, {sizes['ratio_to_fp32']} x smaller than the teacher "
        f"in fp32; try: dqbart generate {result.folder} --text '...'"
    )
    return result.summary() | {"test": {who: score.values for who, score in scores.items()}}
