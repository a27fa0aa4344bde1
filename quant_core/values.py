"""Tell releases apart that compute other values from the same model, records and options."""

# Raise it with every change that moves a published code, scale, offset, bias or factor, however little: what an earlier
# version published is then another job's. Other changes leave it, so that results outlive harmless upgrades.
VALUES_VERSION = 1
