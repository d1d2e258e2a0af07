"""What comes before PPO: supervised fine-tuning and reward modelling, by TRL's trainers."""
