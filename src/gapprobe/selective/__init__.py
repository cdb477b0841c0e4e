"""Selective prediction: answer only when confident. Confidences, measures, thresholds with a guarantee, and a report.

Conventions, everywhere: a larger confidence means more likely right; coverage is the share of rows answered, risk the
share of wrong answers among those answered (El-Yaniv & Wiener 2010). Nothing depends on the order of rows: where a
threshold decides, rows of equal confidence are answered together; AUGRC and PRR take the mean over all orders of tied
rows. Each measure says which. A confidence that is NaN is refused, its row named.
"""

from gapprobe.selective.calibration import calibration_error as calibration_error
from gapprobe.selective.calibration import reliability as reliability
from gapprobe.selective.confidences import Method as Method
from gapprobe.selective.confidences import selective_scores as selective_scores
from gapprobe.selective.confidences import self_consistency as self_consistency
from gapprobe.selective.confidences import stacked as stacked
from gapprobe.selective.measures import RiskCoverage as RiskCoverage
from gapprobe.selective.measures import Tally as Tally
from gapprobe.selective.measures import augrc as augrc
from gapprobe.selective.measures import aurc as aurc
from gapprobe.selective.measures import best_threshold as best_threshold
from gapprobe.selective.measures import coverage_at_risk as coverage_at_risk
from gapprobe.selective.measures import e_aurc as e_aurc
from gapprobe.selective.measures import ideal_aurc as ideal_aurc
from gapprobe.selective.measures import rejection_ratio as rejection_ratio
from gapprobe.selective.measures import reliabilities as reliabilities
from gapprobe.selective.measures import risk_at_coverage as risk_at_coverage
from gapprobe.selective.measures import risk_coverage as risk_coverage
from gapprobe.selective.measures import tally as tally
from gapprobe.selective.measures import trapezoid_aurc as trapezoid_aurc
from gapprobe.selective.operating import THRESHOLD as THRESHOLD
from gapprobe.selective.operating import Selective as Selective
from gapprobe.selective.operating import selective as selective
from gapprobe.selective.report import SelectiveReport as SelectiveReport
from gapprobe.selective.report import selective_report as selective_report
from gapprobe.selective.thresholds import Guarantee as Guarantee
from gapprobe.selective.thresholds import ltt_threshold as ltt_threshold
from gapprobe.selective.thresholds import sgr_threshold as sgr_threshold
