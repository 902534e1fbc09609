"""All studies by name."""

from __future__ import annotations

from studies.catalogue.fig1 import FIGURE_1
from studies.catalogue.fig2 import FIGURE_2
from studies.catalogue.fig3 import FIGURE_3
from studies.catalogue.fig4 import FIGURE_4
from studies.catalogue.fig5 import FIGURE_5
from studies.catalogue.fig6_7 import FIGURE_6, FIGURE_7
from studies.catalogue.generality import GENERALITY
from studies.catalogue.noise_carry import CARRIED
from studies.catalogue.table1 import TABLE_1_STUDY
from studies.catalogue.table7 import TABLE_7_STUDY, UNITS_STUDY
from studies.catalogue.tables2_3_4 import TABLE_2_STUDY, TABLE_3_STUDY, TABLE_4_STUDY
from studies.catalogue.tables5_6 import OPTIMIZER_STATE, TABLE_5_STUDY, TABLE_6_STUDY
from studies.catalogue.unequal_replicas import UNEQUAL

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
