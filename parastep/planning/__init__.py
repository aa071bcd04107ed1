"""What a run will take, before anything is bought or booked: pure arithmetic."""
