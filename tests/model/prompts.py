"""Twenty prompts that a tokenizer and a model can stumble over."""

LONG_TEXT = " ".join(
    f"In chapter {n} the ship {'sailed' if n % 3 else 'rested'}, and number {n * 37 % 101} was "
    f"written in the log beside the name of port {chr(65 + n % 26)}."
    for n in range(1, 60)
)

PROMPTS = [
    "The capital of France is",
    "Once upon a time, in a village by the sea,",
    "Q: What is 17 + 25?\nA:",
    "The three laws of thermodynamics are",
    "Dear Sir or Madam,\n\nI am writing to",
    "List five fruits:\n1.",
    "法国的首都是",
    "从前有一座山,山里有一座庙,",
    "机器学习是人工智能的一个分支,它",
    "def fibonacci(n: int) -> int:\n    ",
    "#include <stdio.h>\n\nint main(void) {\n",
    "SELECT name, COUNT(*) FROM orders WHERE",
    '{"name": "Ada", "born": 1815, "field": "',
    "<html>\n  <body>\n    <h1>",
    "🎉🎂 Happy birthday! 🥳 Let's",
    "👩‍🚀👨‍🚀 The astronauts 🚀🌕",
    "naïve café — “quoted” … ½ × π ≈ 1.57",
    "    indented\n\t\ttabs and   runs of   spaces\n\n\n",
    "a",
    LONG_TEXT,
]
