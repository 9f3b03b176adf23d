"""What models are asked while they are measured, ours and those of other tools alike. It needs nothing but Python: it
is read in their environments, too.
"""

from typing import Final

PROMPT: Final = "a large red circle at the top left on a white background"
QUESTION: Final = "what color is the background?"
ANSWER: Final = "it is red."
"""What the model is held to have said in the turn before."""
EDGE: Final = 128
"""Edge in pixels of the picture of a question; every model resizes it to its own."""
