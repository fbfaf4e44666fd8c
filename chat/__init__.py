"""Talk with a GKD-distilled Qwen3 model: `python app.py` in the browser, `python -m chat` in the terminal."""
