import json
import re


def test_hellaswag_from_a_file(run, tmp_path, invoke):
    question = {"ctx": "He", "endings": ["sat up", "ran", "sat", "was"], "label": 1}
    path = tmp_path / "questions.jsonl"
    path.write_text(f"{json.dumps(question)}\n" * 3)
    output = invoke("eval", run, "--hellaswag", path, "--limit", 2)
    assert re.search(r"hellaswag accuracy +[01]\.0000\n", output)
    assert re.search(r"hellaswag questions +2\n", output)
