"""All studies, by group and by name."""

from __future__ import annotations

from studies.catalog.fig1 import FIGURE_1
from studies.catalog.fig2 import FIGURE_2
from studies.catalog.fig3 import FIGURE_3
from studies.catalog.fig4 import FIGURE_4
from studies.catalog.fig5 import FIGURE_5
from studies.catalog.fig6_7 import FIGURE_6, FIGURE_7
from studies.catalog.generality import GENERALITY
from studies.catalog.noise_carry import CARRIED
from studies.catalog.ratio_rules import (
    RATIO_CANDIDATES,
    RATIO_RULES,
    SENTENCE_RATIO_CANDIDATES,
    SENTENCE_RATIO_RULES,
)
from studies.catalog.sentence_encoder import SENTENCE_ENCODER, SENTENCE_ENCODER_TWEETS
from studies.catalog.single_model import SINGLE_MODEL
from studies.catalog.table1 import TABLE_1_STUDY
from studies.catalog.table7 import TABLE_7_STUDY, UNITS_STUDY
from studies.catalog.tables2_3_4 import TABLE_2_STUDY, TABLE_3_STUDY, TABLE_4_STUDY
from studies.catalog.tables5_6 import OPTIMIZER_STATE, TABLE_5_STUDY, TABLE_6_STUDY
from studies.catalog.unequal_replicas import UNEQUAL

# Title -> studies, in the order of the page of all results.
GROUPS = {
    "Geometry of fine-tuned models": (
        FIGURE_2,
        FIGURE_3,
        FIGURE_4,
        FIGURE_5,
        FIGURE_6,
        FIGURE_7,
        TABLE_1_STUDY,
    ),
    "Model Stock compared with other methods": (
        FIGURE_1,
        TABLE_2_STUDY,
        TABLE_3_STUDY,
        TABLE_4_STUDY,
        TABLE_5_STUDY,
        TABLE_6_STUDY,
        TABLE_7_STUDY,
    ),
    "Variants, other models and other training setups": (
        UNITS_STUDY,
        UNEQUAL,
        OPTIMIZER_STATE,
        CARRIED,
        GENERALITY,
        RATIO_RULES,
        RATIO_CANDIDATES,
        SINGLE_MODEL,
    ),
    "A real sentence encoder": (
        SENTENCE_ENCODER,
        SENTENCE_ENCODER_TWEETS,
        SENTENCE_RATIO_RULES,
        SENTENCE_RATIO_CANDIDATES,
    ),
}
STUDIES = {study.name: study for studies in GROUPS.values() for study in studies}
