"""Scales, codes and products: functions of tensors that know no layer."""
