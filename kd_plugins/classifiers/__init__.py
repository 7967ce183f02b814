"""Classifiers of any library: networks by name, their stages, and the teachers. Importing this imports torch only."""

from kd_plugins.classifiers.network import ClassifierNetwork, DataConfig, create_network, data_config

__all__ = ['ClassifierNetwork', 'DataConfig', 'create_network', 'data_config']
