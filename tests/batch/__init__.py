"""Tests of batch jobs: files, kills, order, memory."""
