"""All studies by name."""

from __future__ import annotations

from modelstock_jax.studies.catalogue.after_training import TABLE_7_STUDY, UNITS_STUDY
from modelstock_jax.studies.catalogue.angles import FIGURE_2
from modelstock_jax.studies.catalogue.baselines import TABLE_2_STUDY, TABLE_3_STUDY, TABLE_4_STUDY
from modelstock_jax.studies.catalogue.carried import CARRIED
from modelstock_jax.studies.catalogue.dynamics import FIGURE_5
from modelstock_jax.studies.catalogue.generality import GENERALITY
from modelstock_jax.studies.catalogue.landscape import FIGURE_3
from modelstock_jax.studies.catalogue.noise import FIGURE_4
from modelstock_jax.studies.catalogue.overview import FIGURE_1
from modelstock_jax.studies.catalogue.periodic import OPTIMIZER_STATE, TABLE_5_STUDY, TABLE_6_STUDY
from modelstock_jax.studies.catalogue.schematic import FIGURE_6, FIGURE_7
from modelstock_jax.studies.catalogue.shell import TABLE_1_STUDY
from modelstock_jax.studies.catalogue.unequal import UNEQUAL

STUDIES = {
    study.name: study
    for study in (
        FIGURE_1,
        FIGURE_2,
        FIGURE_3,
        FIGURE_4,
        FIGURE_5,
        FIGURE_6,
        FIGURE_7,
        TABLE_1_STUDY,
        TABLE_2_STUDY,
        TABLE_3_STUDY,
        TABLE_4_STUDY,
        TABLE_5_STUDY,
        TABLE_6_STUDY,
        TABLE_7_STUDY,
        UNITS_STUDY,
        UNEQUAL,
        OPTIMIZER_STATE,
        CARRIED,
        GENERALITY,
    )
}
