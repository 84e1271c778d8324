"""Log-probabilities of pairs in, one loss per pair [B] out.

Add one: a function in the file of its family, and its yaml. It is found here by its name,
whichever file it stands in. Pure functions; means over pairs are taken elsewhere, and no loss
knows a model or a config. Lengths are scored tokens. A loss that needs no reference does not
take one; one that follows earlier batches takes ``moments``, one that reads the data's score
differences ``margins``, one that reads whole distributions ``divergences``, one that weighs
sentences ``sentences``, one that asks whose an answer is ``reference_sides``, one that draws
``step``. Every loss calls its strength ``beta``; ``beta`` times the policy's change against the
reference is the reward that runs report. What any loss can have besides stands in ``around.py``.
"""

from spo_lightning.losses.adaptive import *  # noqa: F403
from spo_lightning.losses.around import *  # noqa: F403
from spo_lightning.losses.by_token import *  # noqa: F403
from spo_lightning.losses.each_answer import *  # noqa: F403
from spo_lightning.losses.given import *  # noqa: F403
from spo_lightning.losses.reference_free import *  # noqa: F403
from spo_lightning.losses.rewards import *  # noqa: F403
from spo_lightning.losses.unpaired import *  # noqa: F403
from spo_lightning.losses.whole_batch import *  # noqa: F403
from spo_lightning.losses.with_reference import *  # noqa: F403
