"""`python -m jaxtune VERB …`."""

from jaxtune.main import cli

cli()
