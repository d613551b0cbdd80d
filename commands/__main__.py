"""``python -m commands`` is ``notellm``."""

from commands.app import main

main()
