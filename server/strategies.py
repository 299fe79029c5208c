"""Which of Flower's strategies aggregates."""

from flwr.serverapp.strategy import FedAvg, Strategy

from shared.messages import ARRAYS, CONFIG, WEIGHT_KEY


def make_strategy() -> Strategy:
    """Return FedAvg: the average of the sites' weights by their declared number of patients.

    McMahan et al., "Communication-Efficient Learning of Deep Networks from Decentralized Data", 2017.
    """
    return FedAvg(weighted_by_key=WEIGHT_KEY, arrayrecord_key=ARRAYS, configrecord_key=CONFIG)
