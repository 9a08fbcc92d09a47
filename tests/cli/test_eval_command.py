import json
import re


def test_hellaswag_from_a_file(run, tmp_path, invoke):
    question = {"ctx": "He", "endings": ["sat up", "ran", "sat", "was"], "label": 1}
    path = tmp_path / "questions.jsonl"
    path.write_text(f"{json.dumps(question)}\n" * 3)
    output = invoke("eval", run, "--hellaswag", path, "--limit", 2)
    assert re.search(r"hellaswag accuracy +[01]\.0000\n", output)
    assert re.search(r"hellaswag questions +2\n", output)


def test_several_texts_and_folders_are_one_text(run, text, tmp_path, invoke):
    folder = tmp_path / "texts"
    folder.mkdir()
    for name in ("a.txt", "b.txt"):
        (folder / name).write_text(text.read_text()[:150])
    both = tmp_path / "both.txt"
    both.write_text(f"{text.read_text()[:150]}\n{text.read_text()[:150]}")
    scores = [
        invoke("eval", run, *words)
        for words in (
            ["--text", both],
            ["--text", folder],
            ["--text", folder / "a.txt", "--text", folder / "b.txt"],
        )
    ]
    assert scores[0] == scores[1] == scores[2]
