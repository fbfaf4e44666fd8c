"""The guide: data, tokenizer and blank weights of the tiny model that comes with the app; `python -m distill.guide --help`."""
